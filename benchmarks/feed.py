"""Whether models wait for a CPU: the real loop, decoding and encoding around models that sleep.

`python -m benchmarks.feed [--quick] [--cores N]`. Two rollout actors, two teacher replicas and four learner
ranks read 360p clips of 64 frames, about 7,000 video tokens, that no process has read before. Their models
sleep as long as an 8B student's and a 32B teacher's compute on an H100: ROLLOUT_S, SCORE_S and UPDATE_S a
prompt, times N / (CPUs of this machine). So decoding and encoding take the share of this machine's CPUs that
they would take of N. A single encode is then shorter beside a sleep than there.

A row for each lag: seconds of a step, mean, and over the slowest phase; decodes and passes over pixels a
prompt; CPU seconds of preprocessing a prompt, by role and over one encode, which is a call of transformers'
processor. Decoding is not a part of it. The last line is one JSON object.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import clips, events
from benchmarks.command import WARM_UP_STEPS, Row, in_new_process, make_parser, print_result, temporary_demo
from benchmarks.emulated_engines import SLEEPS, SleepyActor, SleepyRank, SleepyReplica
from benchmarks.events import Event
from benchmarks.overlap import Classes, step_seconds, train_emulated
from driver.command_line import prepare
from video_opd.types import Prompt

ROLLOUT_S, SCORE_S, UPDATE_S = 0.34, 0.76, 1.75  # a prompt: of an actor, a replica, a rank
ACTORS, REPLICAS, RANKS = 2, 2, 4
GROUPS = 8
ROLES = ("actor", "teacher", "learner")
ENCODES = 9  # of which the median is one encode
CONFIG = [
    f"groups_per_step={GROUPS}",
    "video={fps: 2, max_frames: 64, max_video_tokens: 8192, decode_workers: 2}",
    f"rollout.num_actors={ACTORS}",
    f"rollout.prompts_per_call={GROUPS // 4}",
    "rollout.prompts_per_result=1",
    "rollout.max_response_tokens=8",
    "rollout.max_model_len=8192",
    "rollout.kv_cache_bytes=268435456",
    "teacher_pool.engine=vllm",
    f"teacher_pool.num_replicas={REPLICAS}",
    "teacher_pool.micro_batch=1",
    "teacher_pool.max_model_len=8192",
    "teacher_pool.kv_cache_bytes=268435456",
    f"learner.world_size={RANKS}",
    "learner.micro_batch=1",
    "loss.kind=opd",
    "checks.max_logprob_gap=null",
]


def slowest_s(times: float) -> float:
    """Of one step's phases."""
    of_process = ROLLOUT_S / ACTORS, SCORE_S / REPLICAS, UPDATE_S / RANKS
    return max(of_process) * GROUPS * times


def measure(lag: int, num_steps: int, times: float, inputs: Sequence[str]) -> Row:
    """One run. `times`: how much longer models sleep here; `inputs`: overrides that name clips and models."""
    with tempfile.TemporaryDirectory() as scratch:
        happened = Path(scratch) / "events"
        happened.mkdir()
        env: dict[str, Any] = {events.FOLDER: happened}
        for name, seconds in zip(SLEEPS, (ROLLOUT_S, SCORE_S, UPDATE_S), strict=True):
            env[name] = seconds * times
        overrides = [*inputs, *CONFIG, *(f"worker_env.{name}='{value}'" for name, value in env.items())]
        overrides += [f"max_policy_lag={lag}", f"num_steps={num_steps}", f"video.cache_dir={scratch}/frames"]
        with temporary_demo(*overrides) as (config, folder):
            train_emulated(config, folder, Classes(SleepyActor, SleepyReplica, SleepyRank))
            steps_s = step_seconds(folder)[: -lag or None]
        step_s = statistics.mean(steps_s)
        row: Row = {"lag": lag, "seconds_per_step": step_s, "range": [min(steps_s), max(steps_s)]}
        row["over_slowest"] = step_s / slowest_s(times)
        return row | summary(events.read_events(happened), num_steps * GROUPS)


def summary(happened: Sequence[Event], num_prompts: int) -> dict[str, float]:
    """What was done for a prompt, on average. What engines try before the first clip is read is left out."""
    decodes = [e for e in happened if e.kind == "decode"]
    first = min(e.began for e in decodes)
    others = [e for e in happened if e.kind != "decode" and e.began > first]
    cpu_s = {f"{r}_cpu_s": sum(e.cpu_s for e in others if e.role == r) / num_prompts for r in ROLES}
    passes = sum(e.kind == "pixels" for e in others)
    counts = {"decodes": len(decodes) / num_prompts, "pixel_passes": passes / num_prompts}
    return counts | cpu_s | {"cpu_s": sum(cpu_s.values())}


def one_encode(inputs: Sequence[str]) -> float:
    """CPU seconds of a call of transformers' processor for one prompt, frames given."""
    from transformers import AutoProcessor

    from video_opd.models.prompting import chat_messages, video_metadata
    from video_opd.video.clips import read_frames

    with temporary_demo(*inputs, *CONFIG) as (config, _):
        prompt = prepare(config).train.pool[0]
    assert isinstance(prompt, Prompt)
    frames, seconds = read_frames(prompt.clip, config.video), []
    processor: Any = AutoProcessor.from_pretrained(config.student)
    for _ in range(ENCODES):
        began = time.process_time()
        messages = chat_messages(config.prompt, prompt.query)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        told: dict[str, Any] = {"video_metadata": [video_metadata(prompt.clip)], "do_sample_frames": False}
        processor(text=[text], videos=[frames.copy()], return_tensors="np", **told)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = make_parser("feed", __doc__, "2 steps of each lag instead of 8")
    parser.add_argument("--cores", type=float, default=16, help="CPUs of the node that is emulated (16)")
    arguments = parser.parse_args()
    here = len(psutil.Process().cpu_affinity() or ())
    steps, times = 2 if arguments.quick else 8, arguments.cores / here
    longest = WARM_UP_STEPS + 1 + steps + 1
    with tempfile.TemporaryDirectory() as folder:
        inputs = clips.write_models(Path(folder) / "models")
        inputs += clips.write_long_clips(Path(folder) / "clips", longest * GROUPS)
        encode_s = in_new_process(one_encode, inputs)
        rows = []
        for lag in (0, 1):
            row = in_new_process(measure, lag, WARM_UP_STEPS + 1 + steps + lag, times, inputs)
            rows.append(row | {"over_one_encode": row["cpu_s"] / encode_s})
    result = {"rows": rows, "one_encode_cpu_s": encode_s, "cores": arguments.cores, "times": times}
    result |= {"lag1_over_slowest": rows[1]["over_slowest"], "slowest_phase_s": slowest_s(times)}
    result |= {"over_one_encode": max(row["over_one_encode"] for row in rows)}
    stand_for = f"{here} CPUs stand for {arguments.cores:g}: models sleep {times:g} times an H100's seconds"
    note = f"{stand_for}; slowest phase {slowest_s(times):.2f} s; one encode {encode_s:.3f} CPU seconds"
    print_result(result, f"{GROUPS} prompts a step of 7,040 video tokens, clips unseen", rows, note)


if __name__ == "__main__":
    main()
