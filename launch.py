"""Video-OPD: on-policy distillation of a video LLM for temporal grounding. Command line and THE loop.

Actors sample, the teacher scores, the curriculum steers, the learner steps. Without arguments it runs the embedded
demo on a CPU.
"""

import argparse
import asyncio
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

import video_opd  # noqa: F401  # first: makes transformers importable
from actors.actor_pool import ActorPool
from curriculum.scheduler import Curriculum
from demo.clips import ensure_clips
from evaluation.report import print_summary, progress_bar, write_report
from learner.checkpoint import latest, new_checkpoint, read_state, write_state
from learner.learner import Learner
from teacher_service.service import TeacherPool
from video_opd.buffer import TrajectoryBuffer
from video_opd.config import Config, describe_keys, load_config, resolve_paths
from video_opd.datasets import read_prompts
from video_opd.errors import CheckpointError, ConfigError, InputError, ParityError, RunError, VideoOPDError
from video_opd.grounding import best_iou, blind_baselines, evaluate
from video_opd.metrics import MetricSinks, PhaseClock
from video_opd.model_files import ModelInfo, check_same_tokenizer, read_model_info
from video_opd.run_folder import new_run_folder, write_config, write_json
from video_opd.schemas import TrajectoryLog, predictions_table, records_table, write_parquet
from video_opd.types import FailedPrompt, Prediction, Prompt, ScoredGroup, StepReport

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Plan:
    """All that can be known before anything starts."""

    student: ModelInfo
    train: list[Prompt]
    eval: list[Prompt]


@dataclass
class Run:
    """The parts of a run, and what it has seen so far."""

    folder: Path
    config: Config
    plan: Plan
    actors: ActorPool
    teacher: TeacherPool
    learner: Learner
    curriculum: Curriculum
    clock: PhaseClock = field(default_factory=PhaseClock)
    totals: Counter[str] = field(default_factory=Counter)
    evaluations: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[Prediction]] = field(default_factory=dict)
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0
    start_step: int = 0


def prepare(config: Config) -> Plan:
    """Checks models, tokenizers, annotations and videos. Raises InputError; starts nothing."""
    student, teacher = read_model_info(config.student), read_model_info(config.teacher)
    check_same_tokenizer(config.student, config.teacher)
    if student.size_multiple != teacher.size_multiple:
        raise ConfigError(
            f"student frames come in multiples of {student.size_multiple} pixels, the teacher's of {teacher.size_multiple}: "
            "use a teacher of the same family"
        )
    if Path(config.data.train.annotations).is_relative_to(HERE / "demo" / "data"):
        ensure_clips(HERE / "demo" / "data")
    train, evaluation = (read_prompts(d, config.video, student.size_multiple) for d in (config.data.train, config.data.eval))
    capacity = (config.max_policy_lag + 1) * config.groups_per_step
    pool = config.curriculum.num_selected or len(train)
    if pool > len(train):
        raise ConfigError(f"curriculum.num_selected={pool}, but the pool has {len(train)} prompts: lower it")
    if pool < capacity:
        raise ConfigError(
            f"{pool} training prompts cannot fill (max_policy_lag + 1) * groups_per_step = {capacity} "
            "slots: add data or lower groups_per_step"
        )
    return Plan(student, train, evaluation)


def describe(config: Config, plan: Plan) -> str:
    """The plan for people: what --dry-run prints."""
    clip = plan.train[0].clip
    rollouts = config.num_steps * config.groups_per_step * config.rollout.rollouts_per_prompt
    return "\n".join(
        [
            f"student   {config.student} ({plan.student.model_type}), {config.learner.dtype}, ZeRO-{config.learner.zero_stage}, "
            f"{config.learner.world_size} rank(s)",
            f"teacher   {config.teacher}, {config.teacher_pool.num_replicas} replica(s) on {config.teacher_pool.engine}",
            f"actors    {config.rollout.num_actors} on vLLM, {config.rollout.prompts_per_call} prompts a call",
            f"data      {len(plan.train)} train and {len(plan.eval)} eval prompts; first clip: {len(clip.frame_indices)} frames "
            f"of {clip.frame_size[0]}x{clip.frame_size[1]} from {clip.duration_s:.1f} s",
            f"loss      {config.loss.kind}, lr {config.learner.lr:g}, curriculum {config.curriculum.kind}",
            f"run       {config.num_steps} steps of {config.groups_per_step} prompts, {rollouts} rollouts, "
            f"policy lag at most {config.max_policy_lag}",
        ]
    )


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
    context = ray.init(address="local", num_cpus=cpus, resources={k: float(v) for k, v in roles.items()}, **shared)
    print(f"Ray dashboard: http://{context.dashboard_url}" if context.dashboard_url else "Ray dashboard: not installed")


def create_parts(folder: Path, config: Config, plan: Plan) -> Run:
    """The parts of a run, their processes on their way."""
    name = f"video_opd/{folder.name}"
    return Run(
        folder=folder,
        config=config,
        plan=plan,
        actors=ActorPool(name, config),
        teacher=TeacherPool(f"{name}/teacher", config),
        learner=Learner(name, config),
        curriculum=Curriculum(name, plan.train, config),
    )


async def publish_weights(run: Run, policy_version: int) -> None:
    """The learner's weights to every actor, as one version."""
    buckets, num_bytes = await run.learner.put_weights(policy_version)
    update = await run.actors.load_weights(policy_version, buckets, num_bytes)
    run.totals["published_bytes"] += update.num_bytes


async def train(run: Run) -> None:
    """Actors sample, the teacher scores, the curriculum steers, the learner steps.

    Two kinds of tasks meet at the buffer. Sampling tasks wait for free slots, and fill them; the learning task waits
    for one step's slots, updates, publishes, and frees them. A crash anywhere stops everything, loudly.
    """
    config, curriculum = run.config, run.curriculum
    steps = config.num_steps - run.start_step
    buffer = TrajectoryBuffer(config.groups_per_step, config.max_policy_lag, steps)
    per_call = config.rollout.prompts_per_call
    capacity = (config.max_policy_lag + 1) * config.groups_per_step
    sinks, log = MetricSinks(run.folder, run.start_step), TrajectoryLog(run.folder / "trajectories", run.start_step)

    async def sample(actor: Any) -> None:
        while slots := await buffer.reserve(per_call):
            while slots:  # a failed prompt leaves its slot to another prompt
                prompts = await curriculum.next_prompts(len(slots))
                with run.clock("rollout"):
                    reference = run.actors.rollout(actor, prompts)
                    groups = await run.actors.result(reference)
                with run.clock("score"):
                    scores = await run.teacher.score(reference)
                failed = [s for s in scores if isinstance(s, FailedPrompt)]
                await curriculum.retire(failed)
                for group, score in zip(groups, scores, strict=True):
                    if not isinstance(score, FailedPrompt):
                        await buffer.fill(slots.popleft(), ScoredGroup(group=group, scores=score))

    async def learn() -> None:
        with progress_bar(config.num_steps, run.start_step) as progress:
            for step in range(run.start_step, config.num_steps):
                started = time.monotonic()
                groups = await buffer.take()
                lags = check_lag(groups, step, config.max_policy_lag)
                with run.clock("update"):
                    report = await run.learner.update(groups, step)
                check_finite(report)
                if step == run.start_step:
                    check_logprob_gap(report, config)
                await curriculum.observe(groups, step)
                with run.clock("publish"):
                    await publish_weights(run, policy_version=step + 1)
                await buffer.release()  # only now may new prompts enter
                log.write(groups, step)
                if config.eval_every and (step + 1) % config.eval_every == 0:
                    await evaluate_student(run, f"step_{step + 1}")
                    report.metrics.update({f"eval/{k}": v for k, v in run.evaluations[f"step_{step + 1}"].items()})
                await record(run, sinks, report, groups, lags, time.monotonic() - started, progress)
                if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                    await checkpoint(run, step + 1)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(learn())
        for actor in islice(cycle(run.actors.actors), max(len(run.actors.actors), -(-capacity // per_call))):
            tasks.create_task(sample(actor))
    sinks.close()
    log.close()


def check_lag(groups: Sequence[ScoredGroup], step: int, max_policy_lag: int) -> list[int]:
    """The policy lag of every trajectory. Raises ParityError where one breaks the bound."""
    lags = [step - t.policy_version for g in groups for t in g.group.trajectories]
    if min(lags) < 0 or max(lags) > max_policy_lag:
        raise ParityError(f"step {step}: policy lags {min(lags)} to {max(lags)}, allowed 0 to {max_policy_lag}")
    return lags


def check_finite(report: StepReport) -> None:
    """A diverged update must not be published. Raises RunError."""
    for name in ("learner/loss", "learner/grad_norm"):
        if not np.isfinite(report.metrics[name]):
            raise RunError(f"step {report.step}: {name} is {report.metrics[name]}: lower learner.lr, or resume from a checkpoint")


def check_logprob_gap(report: StepReport, config: Config) -> None:
    """Actor and learner must agree on the tokens of the first batch."""
    gap, bound = report.metrics["learner/logprob_gap_p99"], config.checks.max_logprob_gap
    if bound is not None and not gap <= bound:
        raise ParityError(
            f"on the first batch the 99th percentile of |actor - learner log-prob| is {gap:.4f}, bound "
            f"{bound} (checks.max_logprob_gap): the two engines do not compute the same model"
        )


async def record(
    run: Run, sinks: MetricSinks, report: StepReport, groups: list[ScoredGroup], lags: list[int], step_s: float, progress: Any
) -> None:
    """One line of metrics: what the learner, the actors and the curriculum say of this step, and where its time went."""
    trajectories = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    tokens = sum(len(t.response_token_ids) for _, t in trajectories)
    run.totals.update(rollout_tokens=tokens, scored_tokens=tokens, rollouts=len(trajectories))
    labelled = [best_iou(t.predicted_span_s, p.answer_spans_s or ()) for p, t in trajectories if p.answer_spans_s]
    seconds = run.clock.lap()
    run.totals.update({f"{phase}_s": s for phase, s in seconds.items()})
    metrics = report.metrics | {
        "actors/miou": float(np.mean(labelled)) if labelled else float("nan"),
        "actors/unparsed_frac": float(np.mean([t.predicted_span_s is None for _, t in trajectories])),
        "actors/truncated_frac": float(np.mean([t.finish_reason == "length" for _, t in trajectories])),
        "actors/policy_lag_mean": float(np.mean(lags)),
        "actors/policy_lag_max": float(max(lags)),
        **await run.curriculum.metrics(),
        **{f"time/{phase}_s": s for phase, s in seconds.items()},
        "time/step_s": step_s,
    }
    sinks.write(StepReport(step=report.step, policy_version=report.policy_version, metrics=metrics), time.time())
    progress.advance(metrics)


async def checkpoint(run: Run, step: int) -> None:
    """Learner, student folder, curriculum and progress as one folder that appears whole or not at all."""
    with new_checkpoint(run.folder, step) as folder:
        await run.learner.save(folder)
        if not (folder / "student").is_dir():
            raise RunError(f"the learner's checkpoint is not at {folder}: runs_dir must be on storage that all nodes share")
        write_state(folder, step, run.plan.student.shapes, await run.curriculum.state_dict(), run.totals)


async def restore(run: Run) -> None:
    """Goes on where the last whole checkpoint stands."""
    folder = latest(run.folder)
    run.start_step, curriculum, totals = read_state(folder, run.plan.student.shapes)
    run.totals.update(totals)
    await run.learner.load(folder)
    await run.curriculum.load_state_dict(curriculum)


async def select_prompts(run: Run) -> None:
    """TVDF: teacher and student answer the pool once; the curriculum drops and selects."""
    config, pool = run.config.curriculum, run.plan.train
    unlabelled = sum(p.answer_spans_s is None for p in pool)
    if unlabelled:
        raise ConfigError(f"curriculum.kind=tvdf validates with ground truth, {unlabelled} prompts have none: label or drop them")
    teacher, student = await asyncio.gather(
        run.teacher.predict(pool, config.num_teacher_predictions, temperature=1.0), run.actors.predict(pool)
    )
    await run.curriculum.retire([f for f in (*teacher, *student) if isinstance(f, FailedPrompt)])
    answered = {p.prompt_id: a for p, a in zip(pool, teacher, strict=True) if not isinstance(a, FailedPrompt)}
    truth = {p.prompt_id: p.answer_spans_s or () for p in pool}
    teacher_iou = {i: float(np.mean([best_iou(a.span_s, truth[i]) for a in answers])) for i, answers in answered.items()}
    student_iou = {a.prompt_id: best_iou(a.span_s, truth[a.prompt_id]) for a in student if isinstance(a, Prediction)}
    predictions = predictions_table(a for answers in answered.values() for a in answers)
    write_parquet(predictions, run.folder / "curriculum" / "teacher_predictions.parquet")
    await run.curriculum.start_round(teacher_iou, student_iou)


async def evaluate_student(run: Run, name: str, blank_video: bool = False) -> None:
    results = await run.actors.predict(run.plan.eval, blank_video)
    run.failed_eval.update({f.prompt_id: f.reason for f in results if isinstance(f, FailedPrompt)})
    answers = [p for p in results if isinstance(p, Prediction)]
    run.evaluations[name], run.examples[name] = evaluate(answers, run.plan.eval), answers


async def evaluate_teacher(run: Run) -> None:
    answers = [a[0] for a in await run.teacher.predict(run.plan.eval) if not isinstance(a, FailedPrompt)]
    run.evaluations["teacher"], run.examples["teacher"] = evaluate(answers, run.plan.eval), answers


async def execute(config: Config, folder: Path, plan: Plan, resume: bool) -> dict[str, Any]:
    """One run from start to summary."""
    began = time.monotonic()
    run = create_parts(folder, config, plan)
    try:
        await asyncio.gather(run.actors.start(), run.teacher.start(), run.learner.start())
        start_up_s = time.monotonic() - began
        await publish_weights(run, policy_version=0)  # the student's start, for the evaluation before training
        await asyncio.gather(evaluate_student(run, "student_before"), evaluate_teacher(run))
        if resume:
            await restore(run)
            await publish_weights(run, policy_version=run.start_step)
        elif config.curriculum.kind == "tvdf":
            await select_prompts(run)
        run.clock.lap()
        trained = time.monotonic()
        await train(run)
        train_s = time.monotonic() - trained
        await evaluate_student(run, "student_after")
        await evaluate_student(run, "no_video", blank_video=True)
        await checkpoint(run, config.num_steps)
        records = await run.curriculum.records()
        write_parquet(records_table(records), folder / "curriculum" / "records.parquet")
        return {
            **{k: run.evaluations[k] for k in ("teacher", "student_before", "student_after")},
            "baselines": blind_baselines(plan.train, plan.eval, config.seed) | {"no_video": run.evaluations["no_video"]},
            "steps": config.num_steps,
            "seed": config.seed,
            "loss": config.loss.kind,
            "seconds": {"start_up": start_up_s, "train": train_s, "total": time.monotonic() - began}
            | {k.removesuffix("_s"): v for k, v in run.totals.items() if k.endswith("_s")},
            "tokens": {k.removesuffix("_tokens"): v for k, v in run.totals.items() if k.endswith("_tokens")},
            "rollouts": run.totals["rollouts"],
            "published_bytes": run.totals["published_bytes"],
            "dropped": {r.prompt_id: r.dropped for r in records if r.dropped},
            "failed_eval": run.failed_eval,
            "examples": {k: {p.prompt_id: p.text for p in run.examples[k]} for k in run.examples if k != "no_video"},
        }
    finally:
        run.teacher.stop()


def launch(config: Config, address: str | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Runs `config` and returns the summary. `resume`: the run folder to go on in."""
    plan = prepare(config)
    if resume:
        step, *_ = read_state(latest(resume), plan.student.shapes)  # a checkpoint of another model ends it here
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
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
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
            print(describe(config, prepare(config)))
        else:
            launch(config, parsed.address, parsed.resume.resolve() if parsed.resume else None)
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
