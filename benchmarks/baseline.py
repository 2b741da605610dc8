"""This system beside what a user would write instead: a plain transformers loop in one process.

`python -m benchmarks.baseline [--quick] [--repeats N] [--cases NAME ...]`. The plain loop,
benchmarks/plain_loop.py, reads with decord, calls the processor once a batch, generates, asks teacher and
student for the logits of the response alone, and updates. The system is a real launch at lag 0 and 1. Both
get the same models, prompts in the same order, frames and micro-batches, in float32, with the demo's
`worker_env` (one OpenMP thread a process); they alternate. Start-up and the first steps are left out, and the
last ones, in which less is sampled.

A row for each case and way: seconds, and core-seconds of all processes, a trajectory; response tokens a
trajectory, which must agree; the system's core-seconds by role, with decode workers and Ray's own processes
as "ray". Medians over the repeats, and of seconds and core-seconds the lowest and the highest. A clip is
"seen" if its frames are in the cache (of the node, or of the plain loop) before the first step, and unseen if
its first prompt decodes it. With 3 queries a clip a prompt begins with its video, which the system computes
once for all three, or with its question, where it can share nothing. The last line is one JSON object:
`rows`, by case `core_over_plain` and `seconds_over_plain`, those of each lag, and `unequal`, the cases whose
responses differ in length by over 2 %.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import clips
from benchmarks.command import WARM_UP_STEPS, Row, in_new_process, make_parser, print_result, temporary_demo
from benchmarks.cpu import StepMarks, between
from curriculum.scheduler import Scheduler
from driver.command_line import prepare
from driver.records.sinks import read_metrics
from preflight.inputs import Plan
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.types import Prompt
from video_opd.video.frame_cache import FrameCache

WAYS = ("plain", "lag 0", "lag 1")
ROLES = ("actors", "teacher", "learner", "driver", "serve", "curriculum", "ray")
LEFT_OUT_STEPS = 2  # at the end: a run samples nothing for the step after its last one
LR = "learner.lr=1e-5"  # responses keep their length
RANGED = ("seconds", "core_s")  # whose lowest and highest are told beside the median
MAX_LENGTH_GAP = 0.02  # between the response tokens of both, or they did not do the same work


@dataclass(frozen=True)
class Case:
    """What both ways do."""

    groups: int  # prompts of a step
    queries: int = 1  # of a clip
    seen: bool = True
    scale: int = 1  # of the demo's frames of 32 x 32 pixels, one video token for two of them
    frames: int = 24
    overrides: tuple[str, ...] = ()

    @property
    def video_tokens(self) -> int:
        return self.frames // 2 * self.scale**2


LONG = ("rollout.max_model_len=1024", "teacher_pool.max_model_len=1024", "rollout.kv_cache_bytes=268435456")
BY_VIDEO = "curriculum.group_by_video=true"
CASES = {
    "batch 64": Case(64),
    "batch 64, unseen": Case(64, seen=False),
    "batch 8": Case(8),
    "batch 8, unseen": Case(8, seen=False),
    "3 queries": Case(64, queries=3, overrides=(BY_VIDEO, "prompt.video_first=true")),
    "3 queries, question first": Case(64, queries=3, overrides=(BY_VIDEO,)),
    "512 tokens": Case(32, scale=8, frames=16, overrides=LONG),
}


def measure(name: str, way: str, num_steps: int, inputs: Sequence[str]) -> Row:
    """One run of `num_steps` that count. `inputs`: overrides that name clips and models."""
    case, lag = CASES[name], int(way == "lag 1")
    all_steps = WARM_UP_STEPS + num_steps + LEFT_OUT_STEPS
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*inputs, *case.overrides, f"groups_per_step={case.groups}", f"num_steps={all_steps}"]
        overrides += [f"max_policy_lag={lag}", f"video.cache_dir={scratch}/frames", "data.eval.max_prompts=2"]
        overrides += [LR, f"video.max_frames={case.frames}", f"video.max_video_tokens={case.video_tokens}"]
        with temporary_demo(*overrides) as (config, folder):
            run = measure_plain if way == "plain" else measure_system
            steps, wall_s, cpu_s, tokens = run(config, case, folder)
    trajectories = steps * case.groups
    row: Row = {"case": name, "way": way, "seconds": wall_s / trajectories}
    row |= {"core_s": sum(cpu_s.values()) / trajectories, "response_tokens": tokens / trajectories}
    return row | {role: cpu_s.get(role, 0.0) / trajectories for role in ROLES}


Measured = tuple[int, float, dict[str, float], float]  # steps, seconds, CPU seconds by role, response tokens


def measure_system(config: Config, case: Case, folder: Path) -> Measured:
    import launch

    if case.seen:
        cache = FrameCache(config.video)
        for prompt in prompts_of(prepare(config)):
            cache.read(prompt.clip)
    with StepMarks(folder / "metrics.jsonl") as watched:
        launch.launch(config)
    last = config.num_steps - LEFT_OUT_STEPS
    steps, wall_s, cpu_s = between(watched.marks, WARM_UP_STEPS, last)
    sampled = [line["actors/rollout_tokens"] for line in read_metrics(folder)]
    tokens = (sampled[last - 1] - sampled[WARM_UP_STEPS - 1]) / (last - WARM_UP_STEPS)
    return steps, wall_s, cpu_s, steps * tokens


def measure_plain(config: Config, case: Case, _: Path) -> Measured:
    from benchmarks.plain_loop import PlainLoop

    plan, loop = prepare(config), PlainLoop(config)
    scheduler = Scheduler(plan.train.pool, config)
    for prompt in prompts_of(plan) if case.seen else ():
        loop.read(prompt.clip)
    tokens, steps = 0, config.num_steps - LEFT_OUT_STEPS - WARM_UP_STEPS
    wall_s = cpu_s = 0.0
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            tokens, wall_s, cpu_s = 0, time.monotonic(), time.process_time()
        prompts: list[Prompt] = []
        while missing := config.groups_per_step - len(prompts):
            prompts += scheduler.next_prompts(missing)
        tokens += loop.step(prompts)[1]
        scheduler.observe([(p.prompt_id, 1, False) for p in prompts], step)
    return steps, time.monotonic() - wall_s, {"plain": time.process_time() - cpu_s}, tokens


def prompts_of(plan: Plan) -> list[Prompt]:
    return [prompt for prompt in plan.train.pool if isinstance(prompt, Prompt)]


def write_inputs(case: Case, num_steps: int, folder: Path) -> list[str]:
    """The models, and as many clips as the case reads or, if it reads them again, as fill a buffer."""
    prompts = case.groups * (2 if case.seen else WARM_UP_STEPS + num_steps + LEFT_OUT_STEPS)
    written = clips.write_demo_clips(folder / "clips", -(-prompts // case.queries), case.queries, case.scale)
    return clips.write_models(folder / "models") + written


def medians(runs: Sequence[Row]) -> Row:
    """One row of the repeats of a case and way; `_range`: lowest and highest."""
    row: Row = {}
    for key, first in runs[0].items():
        if isinstance(first, str):
            row[key] = first
            continue
        values = [run[key] for run in runs]
        row[key] = statistics.median(values)
        row |= {f"{key}_range": [min(values), max(values)]} if key in RANGED else {}
    return row


def compare(rows: Sequence[Row]) -> Row:
    """The result: each lag over the plain loop, and the cases whose responses differ in length."""
    result: Row = {"rows": list(rows), "core_over_plain": {}, "seconds_over_plain": {}, "unequal": []}
    for case in dict.fromkeys(row["case"] for row in rows):
        plain, *lags = (row for row in rows if row["case"] == case)
        for key, over in (("core_s", "core_over_plain"), ("seconds", "seconds_over_plain")):
            result[over][case] = [row[key] / plain[key] for row in lags]
        gaps = [abs(row["response_tokens"] / plain["response_tokens"] - 1) for row in lags]
        result["unequal"] += [case] if max(gaps) > MAX_LENGTH_GAP else []
    return result


def main() -> None:
    parser = make_parser("baseline", __doc__, "fewer steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    os.environ |= load_demo().worker_env  # the plain loop's too
    trajectories = 128 if arguments.quick else 384
    rows = []
    for name in arguments.cases:
        case, runs = CASES[name], []
        steps = max(4, trajectories // case.groups)
        with tempfile.TemporaryDirectory() as folder:
            inputs = write_inputs(case, steps, Path(folder))
            for _ in range(arguments.repeats):
                runs += [in_new_process(measure, name, way, steps, inputs) for way in WAYS]
        rows += [medians([run for run in runs if run["way"] == way]) for way in WAYS]
    result = compare(rows)
    note = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs; responses of another length: "
    title = f"a trajectory of the demo's models, medians of {arguments.repeats}"
    print_result(result, title, rows, note + (", ".join(result["unequal"]) or "none"))


if __name__ == "__main__":
    main()
