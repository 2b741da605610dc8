"""Video-OPD: on-policy distillation of a video LLM for temporal grounding. Command line and THE loop.

Actors sample, the teacher scores, the curriculum steers, the learner steps. Without arguments it runs the embedded
demo on a CPU.
"""

import argparse
import asyncio
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray

import video_opd  # noqa: F401  # first: makes transformers importable
from actors.actor_pool import ActorPool
from curriculum.scheduler import Curriculum
from curriculum.teacher_answers import TEMPERATURE, find_answers, prompt_keys, settings_key, write_answers
from demo.clips import ensure_clips
from evaluation.report import StepProgress, print_summary, progress_bar, write_report
from learner.checkpoint import new_checkpoint, read_state, write_state
from learner.learner import Learner
from teacher_service.service import ScoreResult, TeacherPool
from video_opd.buffer import TrajectoryBuffer
from video_opd.config import Config, describe_keys, load_config, resolve_paths
from video_opd.demonstrations import Demonstrator
from video_opd.errors import CheckpointError, ConfigError, InputError, ParityError, RunError, VideoOPDError
from video_opd.grounding import best_iou, blind_baselines, evaluate, prompt_iou
from video_opd.memory_check import check_fits, describe_memory
from video_opd.metrics import MetricSinks, PhaseClock
from video_opd.plan import Plan, describe, make_draft, make_plan, memory_plan
from video_opd.rewards import Reward, load_rewards, total_reward
from video_opd.run_folder import latest_checkpoint, new_run_folder, write_config, write_json
from video_opd.schemas import TrajectoryLog, write_parquet
from video_opd.types import FailedPrompt, Prediction, Prompt, ScoredGroup, StepReport, TeacherScores, Trajectory, TrajectoryGroup

HERE = Path(__file__).resolve().parent
ANSWERS_A_WRITE = 4096


@dataclass
class Run:
    """The parts of a run, and what it has seen so far."""

    folder: Path
    config: Config
    plan: Plan
    actors: ActorPool
    teacher: TeacherPool | None  # None: neither the objective nor the curriculum asks one
    learner: Learner
    curriculum: Curriculum
    rewards: list[Reward]  # empty: the objective needs none
    clock: PhaseClock = field(default_factory=PhaseClock)
    totals: Counter[str] = field(default_factory=Counter)
    evaluations: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[Prediction]] = field(default_factory=dict)
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0
    step: int = 0  # the next to do
    published: int = -1  # the version that the actors have
    round_end: int | None = None  # the step at which the curriculum selects again; None: never
    gap_is_checked: bool = False

    @property
    def out_of_budget(self) -> bool:
        return self.totals["scored_tokens"] >= (self.config.max_scored_tokens or math.inf)


def prepare(config: Config) -> Plan:
    """The plan; the demo's clips are written where they are missing. Raises InputError; starts nothing."""
    if Path(config.data.train.annotations).is_relative_to(HERE / "demo" / "data"):
        ensure_clips(HERE / "demo" / "data")
    return make_plan(config)


def start_ray(config: Config, address: str | None) -> None:
    """Connects to `address`, or starts a Ray of this machine alone."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are not to yield to the driver
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "namespace": "video_opd",
        "runtime_env": {"env_vars": {"PYTHONPATH": paths}},
    }
    if address:
        try:
            ray.init(address=address, **shared)
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {address}: start one with `ray up cluster.yaml` ({error})") from error
        return
    roles = {"rollout": config.rollout.num_actors, "teacher": 64, "learner": config.learner.world_size}
    cpus = max(os.cpu_count() or 1, 4 + sum(roles.values()) - 64)
    context = ray.init(address="local", num_cpus=cpus, resources={k: float(v) for k, v in roles.items() if v}, **shared)
    print(f"Ray dashboard: http://{context.dashboard_url}" if context.dashboard_url else "Ray dashboard: not installed")


def create_parts(folder: Path, config: Config, plan: Plan) -> Run:
    """The parts of a run, their processes on their way."""
    name = f"video_opd/{folder.name}"
    return Run(
        folder=folder,
        config=config,
        plan=plan,
        actors=ActorPool(name, config),
        teacher=TeacherPool(f"{name}/teacher", config) if config.needs_teacher else None,
        learner=Learner(name, config),
        curriculum=Curriculum(name, plan.train, config),
        rewards=load_rewards(config.loss.rewards) if config.loss.needs.rewards else [],
    )


async def publish_weights(run: Run, policy_version: int) -> None:
    """The learner's weights to every actor, as one version."""
    buckets, num_bytes = await run.learner.put_weights(policy_version)
    update = await run.actors.load_weights(policy_version, buckets, num_bytes)
    run.totals["published_bytes"] += update.num_bytes
    run.published = policy_version


async def ask_student(run: Run, prompts: Sequence[Prompt], blank_video: bool = False) -> list[Prediction | FailedPrompt]:
    """The student's greedy answers, with the weights of the step where the run stands."""
    if run.published != run.step:  # without rollouts nobody needed them before
        await publish_weights(run, run.step)
    return await run.actors.predict(prompts, blank_video)


@dataclass(frozen=True)
class Outputs:
    """What a step is told to."""

    sinks: MetricSinks
    log: TrajectoryLog
    progress: StepProgress


async def train(run: Run) -> None:
    """Rounds, from where the run stands to its end: the curriculum selects, then the loop runs over what it selected."""
    config = run.config
    sinks, log = MetricSinks(run.folder, run.step), TrajectoryLog(run.folder / "trajectories", run.step)
    with closing(sinks), closing(log), progress_bar(config.num_steps, run.step) as progress:
        while run.step < config.num_steps and not run.out_of_budget:
            if run.step == run.round_end:
                await start_round(run, progress)
            until = config.num_steps if run.round_end is None else min(run.round_end, config.num_steps)
            await train_round(run, until, Outputs(sinks, log, progress))


async def train_round(run: Run, until: int, outputs: Outputs) -> None:
    """Actors sample, the teacher scores, the curriculum steers, the learner steps.

    Two kinds of tasks meet at the buffer. Sampling tasks wait for free slots, and fill them; the learning task waits
    for one step's slots, updates, publishes, and frees them. A crash anywhere stops everything, loudly.
    """
    config, curriculum = run.config, run.curriculum
    demonstrate = Demonstrator(config)
    buffer = TrajectoryBuffer(config.groups_per_step, config.max_policy_lag, until - run.step)
    per_call = config.rollout.prompts_per_call
    capacity = (config.max_policy_lag + 1) * config.groups_per_step

    async def sample(actor: Any) -> None:
        while slots := await buffer.reserve(per_call):
            while slots:  # a failed prompt leaves its slot to another prompt
                prompts = await curriculum.next_prompts(len(slots))
                if config.loss.needs.rollouts:
                    with run.clock("rollout"):
                        reference = run.actors.rollout(actor, prompts)
                        results = await run.actors.result(reference)
                    run.clock.count("rollout", sum(num_tokens(r.trajectories) for r in results if isinstance(r, TrajectoryGroup)))
                else:
                    reference = results = demonstrate(prompts, run.step)
                groups = await score(run, reference, results)
                await curriculum.retire([g for g in groups if isinstance(g, FailedPrompt)])
                for group in groups:
                    if isinstance(group, ScoredGroup):
                        await buffer.fill(slots.popleft(), group)

    async def learn() -> None:
        while run.step < until and not run.out_of_budget:
            step, started = run.step, time.monotonic()
            groups = await buffer.take()
            lags = check_lag(groups, step, config.max_policy_lag)
            with run.clock("update"):
                report = await run.learner.update(groups, step)
            run.clock.count("update", sum(num_tokens(g.group.trajectories) for g in groups))
            check_finite(report)
            check_logprob_gap(run, report)
            await curriculum.observe(groups, step)
            if config.loss.needs.rollouts:
                with run.clock("publish"):
                    await publish_weights(run, policy_version=step + 1)
            run.step += 1
            await buffer.release()  # only now may new prompts enter
            step_s = time.monotonic() - started
            if config.eval_every and run.step % config.eval_every == 0:
                with run.clock("evaluate"):
                    await evaluate_student(run, f"step_{run.step}")
                report.metrics.update({f"eval/{k}": v for k, v in run.evaluations.get(f"step_{run.step}", {}).items()})
            await record(run, outputs, report, groups, lags, step_s)
            if config.checkpoint_every and run.step % config.checkpoint_every == 0:
                await checkpoint(run)
        await buffer.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(learn())
        for actor in islice(cycle(run.actors.actors or [None]), max(len(run.actors.actors), -(-capacity // per_call))):
            tasks.create_task(sample(actor))


async def score(
    run: Run, reference: ray.ObjectRef | list[TrajectoryGroup], results: Sequence[TrajectoryGroup | FailedPrompt]
) -> list[ScoredGroup | FailedPrompt]:
    """Every group with what the objective needs: the teacher's scores, rewards, or neither; in order.

    The teacher is not asked for suspended rollouts and failed prompts. `reference`: of the results, for the teacher to fetch.
    """
    groups = [r if isinstance(r, FailedPrompt) else run.curriculum.route(r) for r in results]
    asked = [g for g in groups if isinstance(g, TrajectoryGroup) and g.trajectories]
    scores: Iterator[ScoreResult] = repeat(())
    if asked and run.config.loss.needs.teacher != "none":
        assert run.teacher, "the objective needs a teacher"
        whole = len(asked) == len(results) and not any(g.suspended for g in asked)
        with run.clock("score"):
            scores = iter(await run.teacher.score(reference if whole else asked))  # the reference is fetched past the driver
        run.totals["scored_rollouts"] += sum(len(g.trajectories) for g in asked)
        tokens = sum(num_tokens(g.trajectories) for g in asked)
        run.totals["scored_tokens"] += tokens
        run.clock.count("score", tokens)
    scored: list[ScoredGroup | FailedPrompt] = []
    for group in groups:
        if isinstance(group, TrajectoryGroup):
            result = next(scores) if group.trajectories else ()
            scored.append(result if isinstance(result, FailedPrompt) else with_rewards(run, group, result))
        else:
            scored.append(group)
    return scored


def with_rewards(run: Run, group: TrajectoryGroup, scores: tuple[TeacherScores, ...]) -> ScoredGroup:
    """The learner's payload; with rewards where the objective needs them."""
    rewards = tuple(total_reward(run.rewards, t, group.prompt) for t in group.trajectories) if run.rewards else None
    return ScoredGroup(group=group, scores=scores, rewards=rewards)


def mean(values: Sequence[float]) -> float:
    """NaN of nothing, which no sink writes."""
    return float(np.mean(values)) if values else math.nan


def num_tokens(trajectories: Iterable[Trajectory]) -> int:
    """Response tokens."""
    return sum(len(t.response_token_ids) for t in trajectories)


def check_lag(groups: Sequence[ScoredGroup], step: int, max_policy_lag: int) -> list[int]:
    """The policy lag of every trajectory. Raises ParityError where one breaks the bound."""
    lags = [step - t.policy_version for g in groups for t in g.group.sampled if t.prompt_fingerprint is not None]
    if lags and (min(lags) < 0 or max(lags) > max_policy_lag):
        raise ParityError(f"step {step}: policy lags {min(lags)} to {max(lags)}, allowed 0 to {max_policy_lag}")
    return lags


def check_finite(report: StepReport) -> None:
    """A diverged update must not be published. Raises RunError."""
    for name in ("learner/loss", "learner/grad_norm"):
        if not np.isfinite(report.metrics[name]):
            raise RunError(f"step {report.step}: {name} is {report.metrics[name]}: lower learner.lr, or resume from a checkpoint")


def check_logprob_gap(run: Run, report: StepReport) -> None:
    """Actor and learner must agree on the tokens of the first batch that has any."""
    gap, bound = report.metrics.get("learner/logprob_gap_p99"), run.config.checks.max_logprob_gap
    if run.gap_is_checked or bound is None or gap is None:
        return
    run.gap_is_checked = True
    if not gap <= bound:
        raise ParityError(
            f"on the first batch the 99th percentile of |actor - learner log-prob| is {gap:.4f}, bound "
            f"{bound} (checks.max_logprob_gap): the two engines do not compute the same model"
        )


async def record(run: Run, outputs: Outputs, report: StepReport, groups: list[ScoredGroup], lags: list[int], step_s: float) -> None:
    """One line of metrics: what the learner, the actors and the curriculum say of this step, and where its time went."""
    trajectories = [(g.group.prompt, t) for g in groups for t in g.group.sampled if t.prompt_fingerprint is not None]
    num_suspended = sum(len(g.group.suspended) for g in groups)
    rollout_tokens = num_tokens(t for _, t in trajectories)
    run.totals.update(rollout_tokens=rollout_tokens, rollouts=len(trajectories), suspended_rollouts=num_suspended)
    labelled = [best_iou(t.predicted_span_s, p.answer_spans_s or ()) for p, t in trajectories if p.answer_spans_s]
    seconds, tokens_per_s = run.clock.lap()
    run.totals.update({f"{phase}_s": s for phase, s in seconds.items()})
    metrics = report.metrics | {
        "actors/miou": mean(labelled),
        "actors/unparsed_frac": mean([t.predicted_span_s is None for _, t in trajectories]),
        "actors/truncated_frac": mean([t.finish_reason == "length" for _, t in trajectories]),
        "actors/policy_lag_mean": mean(lags),
        "actors/policy_lag_max": float(max(lags, default=math.nan)),
        "actors/rollout_tokens": float(run.totals["rollout_tokens"]),
        "teacher/scored_tokens": float(run.totals["scored_tokens"]),
        "curriculum/suspended_frac": num_suspended / max(1, len(trajectories)),
        **await run.curriculum.metrics(),
        **{f"time/{phase}_s": s for phase, s in seconds.items()},
        "time/step_s": step_s,
        **{f"tokens_per_s/{phase}": rate for phase, rate in tokens_per_s.items()},
    }
    outputs.log.write(groups, report.step)
    outputs.sinks.write(StepReport(step=report.step, policy_version=report.policy_version, metrics=metrics), time.time())
    outputs.progress.advance(metrics)


async def checkpoint(run: Run) -> None:
    """Learner, student folder, curriculum and progress as one folder that appears whole or not at all."""
    with new_checkpoint(run.folder, run.step) as folder:
        await run.learner.save(folder)
        if not (folder / "student").is_dir():
            raise RunError(f"the learner's checkpoint is not at {folder}: runs_dir must be on storage that all nodes share")
        write_state(folder, run.step, run.plan.student.shapes, await run.curriculum.state_dict(), run.totals)


async def restore(run: Run) -> None:
    """Goes on where the last whole checkpoint stands."""
    folder = latest_checkpoint(run.folder)
    run.step, curriculum, totals = read_state(folder, run.plan.student.shapes)
    run.totals.update(totals)
    await run.learner.load(folder)
    await run.curriculum.load_state_dict(curriculum)
    num_rounds = len(curriculum["records"]["student_iou"][0])
    for snapshot in (run.folder / "curriculum").glob("*.parquet"):  # later than where the run now stands
        number = snapshot.stem.removeprefix("round-")
        if snapshot.stem == "records" or (number.isdigit() and int(number) > num_rounds):
            snapshot.unlink()


async def start_round(run: Run, progress: StepProgress) -> None:
    """The curriculum's next round: the teacher answers the pool once a run, the student at the start of every round."""
    config, started = run.config.curriculum, time.monotonic()
    if run.step == 0 and config.asks_teacher:
        await run.curriculum.validate(await teacher_ious(run, progress))
    student_iou = await student_ious(run) if config.asks_student else None
    run.round_end = await run.curriculum.start_round(student_iou, run.step)
    records = await run.curriculum.records()
    number = len(records["student_iou"][0])
    write_parquet(records, run.folder / "curriculum" / f"round-{number}.parquet")
    selected, dropped = records["selected"].to_numpy(), records["dropped"].to_numpy() != ""
    progress.say(f"round {number}: {selected.sum()} of {len(records)} prompts selected, {dropped.sum()} dropped")
    run.clock.lap()  # no step's time
    run.totals.update({"select_s": time.monotonic() - started})


async def teacher_ious(run: Run, progress: StepProgress) -> np.ndarray:
    """float64[P]: tau, NaN where a clip cannot be read. Answers that a run in runs_dir has are not generated again."""
    config, pool = run.config, run.plan.train
    assert run.teacher, "the curriculum asks one"
    settings, keys = settings_key(config), await asyncio.to_thread(prompt_keys, pool, config)
    answers = find_answers(sorted(Path(config.runs_dir).iterdir()), settings, set(keys))
    progress.say(f"teacher answers: {len(answers)} of {len(set(keys))} found in {config.runs_dir}")
    missing = [(key, prompt) for key, prompt in dict(zip(keys, pool, strict=True)).items() if key not in answers]
    for first in range(0, len(missing), ANSWERS_A_WRITE):
        part = missing[first : first + ANSWERS_A_WRITE]
        results = await run.teacher.predict([p for _, p in part], config.curriculum.num_teacher_predictions, TEMPERATURE)
        run.totals["teacher_answers"] += sum(len(r) for r in results if not isinstance(r, FailedPrompt))
        await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
        answers |= {key: r for (key, _), r in zip(part, results, strict=True) if not isinstance(r, FailedPrompt)}
        write_answers(run.folder, settings, answers)  # whole again each time: an interrupted run has answered what it has
    write_answers(run.folder, settings, answers)
    reading = config.curriculum.multi_span_iou
    ious = [[prompt_iou(a.span_s, p, reading) for a in answers.get(key, ())] for key, p in zip(keys, pool, strict=True)]
    return np.array([np.mean(of_prompt) if of_prompt else np.nan for of_prompt in ious])


async def student_ious(run: Run) -> np.ndarray:
    """float64[P]: sigma of the current student, NaN where a clip cannot be read or the prompt is dropped."""
    places = await run.curriculum.alive()
    pool = [run.plan.train[i] for i in places]
    results = await ask_student(run, pool)
    await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
    ious = np.full(len(run.plan.train), np.nan)
    reading = run.config.curriculum.multi_span_iou
    ious[places] = [
        np.nan if isinstance(r, FailedPrompt) else prompt_iou(r.span_s, p, reading) for r, p in zip(results, pool, strict=True)
    ]
    return ious


async def evaluate_student(run: Run, name: str, blank_video: bool = False) -> None:
    if not run.actors.actors:
        return
    results = await ask_student(run, run.plan.eval, blank_video)
    run.failed_eval.update({f.prompt_id: f.reason for f in results if isinstance(f, FailedPrompt)})
    answers = [p for p in results if isinstance(p, Prediction)]
    run.evaluations[name], run.examples[name] = evaluate(answers, run.plan.eval), answers


async def evaluate_teacher(run: Run) -> None:
    if run.teacher is None:
        return
    answers = [a[0] for a in await run.teacher.predict(run.plan.eval) if not isinstance(a, FailedPrompt)]
    run.evaluations["teacher"], run.examples["teacher"] = evaluate(answers, run.plan.eval), answers


async def execute(config: Config, folder: Path, plan: Plan, resume: bool) -> dict[str, Any]:
    """One run from start to summary."""
    began = time.monotonic()
    run = create_parts(folder, config, plan)
    try:
        await asyncio.gather(run.actors.start(), run.learner.start(), *([run.teacher.start()] if run.teacher else []))
        start_up_s = time.monotonic() - began
        await asyncio.gather(evaluate_student(run, "student_before"), evaluate_teacher(run))
        if resume:
            await restore(run)
            if run.actors.actors:
                await publish_weights(run, policy_version=run.step)
        run.round_end = await run.curriculum.round_end()
        run.clock.lap()
        trained = time.monotonic()
        await train(run)
        train_s = time.monotonic() - trained
        await evaluate_student(run, "student_after")
        await evaluate_student(run, "no_video", blank_video=True)
        await checkpoint(run)
        records = await run.curriculum.records()
        write_parquet(records, folder / "curriculum" / "records.parquet")
        return {
            **{k: run.evaluations.get(k) for k in ("teacher", "student_before", "student_after")},
            "baselines": blind_baselines(plan.train, plan.eval, config.seed) | {"no_video": run.evaluations.get("no_video")},
            "steps": run.step,
            "seed": config.seed,
            "loss": config.loss.kind,
            "seconds": {"start_up": start_up_s, "train": train_s, "total": time.monotonic() - began}
            | {k.removesuffix("_s"): v for k, v in run.totals.items() if k.endswith("_s")},
            "tokens": {k: run.totals[f"{k}_tokens"] for k in ("rollout", "scored")},
            "rollouts": run.totals["rollouts"],
            "suspended_rollouts": run.totals["suspended_rollouts"],
            "teacher_calls": run.totals["scored_rollouts"],
            "teacher_answers": run.totals["teacher_answers"],
            "published_bytes": run.totals["published_bytes"],
            "dropped": plan.unreadable
            | {r["prompt_id"]: r["dropped"] for r in records.filter(pc.field("dropped") != "").to_pylist()},
            "failed_eval": run.failed_eval,
            "examples": {k: {p.prompt_id: p.text for p in run.examples[k]} for k in run.examples if k != "no_video"},
        }
    finally:
        if run.teacher:
            run.teacher.stop()


def dry_run(config: Config, gpu_memory_gib: float | None) -> None:
    """Checks what is here, prints the plan and its memory; starts and writes nothing. Raises InputError."""
    draft = make_draft(config)
    memory = memory_plan(config, draft, gpu_memory_gib)
    print(describe(config, draft))
    print(describe_memory(memory))
    check_fits(memory, one_machine=True)


def launch(
    config: Config, address: str | None = None, resume: Path | None = None, gpu_memory_gib: float | None = None
) -> dict[str, Any]:
    """Runs `config` and returns the summary. `resume`: the run folder to go on in."""
    plan = prepare(config)
    check_fits(memory_plan(config, plan, gpu_memory_gib), one_machine=False)
    if resume:
        step, *_ = read_state(latest_checkpoint(resume), plan.student.shapes)  # a checkpoint of another model ends it here
        if step > config.num_steps:
            raise ConfigError(f"{resume} stands at step {step}, beyond num_steps={config.num_steps}: raise num_steps")
    folder = resume or new_run_folder(config)
    start_ray(config, address)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        summary = asyncio.run(execute(config, folder, plan, resume is not None))
    finally:
        ray.shutdown()
    write_json(folder / "summary.json", summary)
    write_report(folder, config, plan.eval, summary)
    print_summary(folder, summary)
    return summary


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch.py",
        description=__doc__,
        epilog="configuration keys and their defaults:\n" + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. learner.lr=1e-6")
    parser.add_argument("--config", type=Path, help="YAML file (default: configs/demo.yaml, the embedded demo)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on in this run folder from its last checkpoint")
    parser.add_argument("--address", help="of a running Ray cluster, e.g. auto (default: start one on this machine)")
    parser.add_argument("--dry-run", action="store_true", help="check what is here, print plan and memory, start nothing")
    parser.add_argument("--gpu-memory-gib", type=float, help="memory of one GPU (default: this machine's, or 80 without one)")
    return parser.parse_args(arguments)


def read_config(arguments: argparse.Namespace) -> Config:
    if arguments.resume and arguments.config:
        raise ConfigError("--resume goes on with the run's own config: leave out --config")
    if arguments.resume and not (arguments.resume / "config.yaml").is_file():
        raise CheckpointError(f"{arguments.resume} is not a run folder: it has no config.yaml")
    if not arguments.resume and not arguments.config:  # the demo runs from anywhere
        return resolve_paths(load_config(HERE / "configs" / "demo.yaml", arguments.overrides), HERE)
    path = arguments.resume / "config.yaml" if arguments.resume else arguments.config
    return resolve_paths(load_config(path, arguments.overrides), Path.cwd())


def first_error(error: BaseException) -> BaseException:
    """The error inside a task group's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 bad input."""
    parsed = parse_arguments(arguments)
    try:
        config = read_config(parsed)
        if parsed.dry_run:
            dry_run(config, parsed.gpu_memory_gib)
        else:
            launch(config, parsed.address, parsed.resume.resolve() if parsed.resume else None, parsed.gpu_memory_gib)
    except (VideoOPDError, BaseExceptionGroup) as error:
        cause = first_error(error)
        if not isinstance(cause, VideoOPDError):
            traceback.print_exception(cause)
            return 1
        print(f"error: {getattr(cause, 'cause', None) or cause}", file=sys.stderr)
        return 2 if isinstance(cause, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
