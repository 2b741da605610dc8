"""Video-OPD: on-policy distillation of a video LLM for temporal grounding. The training loop and main.

Actors sample, the teacher scores, the curriculum steers, the learner steps.
Without arguments it runs the embedded demo on a CPU.
"""

import asyncio
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import video_opd  # noqa: F401  # first: makes transformers importable
from actors.actor_pool import RolloutResult
from driver.buffer import TrajectoryBuffer
from driver.checkpoints import remove_rounds_after, restore, save_at_end, save_if_due
from driver.command_line import parse_arguments, prepare, read_config, resumed_folder, saved_run_to_resume
from driver.held_out import evaluate_end, evaluate_if_due, evaluate_start
from driver.invariants import check_finite, check_lag, check_logprob_gap
from driver.progress import SavedRun
from driver.records.card import note_command, write_card
from driver.records.gauges import export_gauges
from driver.records.report import print_summary, progress_bar, write_report
from driver.records.sinks import MetricSinks, TrajectoryLog
from driver.records.step import Outputs, num_tokens, record
from driver.records.summary import summarise
from driver.records.trackers import Trackers
from driver.recovery import learner_lost, poll_control, recover, watch
from driver.rounds import next_call, start_round, validate_first
from driver.run import Run, create_parts, publish_weights, start_parts
from driver.run_state import Phase
from driver.scoring import count_rewards, reward_baseline, roll_out, score
from driver.signals import stopped_by_signals
from driver.start_ray import leave_ray, start_ray, warn_of_small_stores
from driver.stopping import ended_with_ray, how_to_resume, shutdown_at_end
from driver.upload import check_writable
from preflight.cluster_file import check_cluster
from preflight.disk import check_disk, disk_plan
from preflight.dry_run import dry_run
from preflight.inputs import Plan
from preflight.memory_fit import MemoryPlan, check_fits, memory_plan
from preflight.nodes import check_gpus
from video_opd.cluster.deadline import waiting
from video_opd.config import Config
from video_opd.errors import InputError, LearnerLostError, SaveError, StoppedError, VideoOPDError, first_error
from video_opd.files.run_folder import locked, new_run_folder, write_config, write_json
from video_opd.hub import on_this_node, pinned
from video_opd.logs import driver_log, work
from video_opd.schemas import write_parquet
from video_opd.types import FailedPrompt, ScoredGroup


async def train(run: Run) -> None:
    """Trains to num_steps, in rounds: the curriculum selects prompts, then the loop runs over them."""
    last = run.config.num_steps
    sinks = MetricSinks(run.folder, run.step, run.trackers)
    log = TrajectoryLog(run.folder / "trajectories", run.step)
    with closing(sinks), closing(log), progress_bar(last, run.step) as progress:
        while run.step < last and not run.is_over:
            if run.step == run.next_selection:
                await start_round(run)
            until = last if run.next_selection is None else min(run.next_selection, last)
            await train_round(run, until, Outputs(sinks, log, progress))


async def train_round(run: Run, until: int, outputs: Outputs) -> None:
    """Trains to step `until`. Sampling tasks wait for free slots of the buffer and fill them.

    The learning task waits for the filled slots of one step, updates, publishes, and frees them.
    """
    config, curriculum = run.config, run.curriculum
    sizes = await curriculum.step_sizes(run.step, until)
    buffer, first = TrajectoryBuffer(sizes, config.max_policy_lag), run.step
    run.buffer = buffer

    async def sample() -> None:
        while call := await next_call(run, buffer):
            slots, prompts = call
            while slots:  # the slot of a failed prompt goes to another prompt
                prompts = prompts or await curriculum.next_prompts(len(slots))
                slot_of = {p.prompt_id: slot for p, slot in zip(prompts, slots, strict=False)}
                steps = [first + buffer.step_of(slot) for slot in slot_of.values()]
                async with asyncio.TaskGroup() as scoring:  # each result as soon as it arrives
                    tasks = [
                        scoring.create_task(score_and_fill(slot_of, reference, results))
                        async for reference, results in roll_out(run, prompts, steps)
                    ]
                filled = set[int]().union(*(task.result() for task in tasks))
                slots, prompts = [slot for slot in slots if slot not in filled], []

    async def score_and_fill(
        slot_of: dict[str, int], reference: Any, results: Sequence[RolloutResult]
    ) -> set[int]:
        groups = await score(run, reference, results)
        await curriculum.retire([g for g in groups if isinstance(g, FailedPrompt)])
        scored = {slot_of[g.group.prompt.prompt_id]: g for g in groups if isinstance(g, ScoredGroup)}
        for slot, group in scored.items():
            await buffer.fill(slot, group)
        return set(scored)

    async def learn() -> None:
        while run.step < until and not run.is_over:
            await learn_step(run, buffer, outputs)
        await buffer.close()

    async with asyncio.TaskGroup() as tasks:  # an error in one task stops them all
        tasks.create_task(learn())
        for _ in range(config.most_calls):
            tasks.create_task(sample())


async def learn_step(run: Run, buffer: TrajectoryBuffer, outputs: Outputs) -> None:
    """One step of the learner, from its trajectories to its line of metrics and its checkpoint."""
    config, step, started = run.config, run.step, time.monotonic()
    with waiting(f"the trajectories of step {step}"):
        groups = await buffer.take()
    wait_s = time.monotonic() - started
    lags = check_lag(groups, step, config.max_policy_lag)
    run.state.enter(Phase.UPDATING)  # a signal now waits for the end of the step
    with run.clock("update"):
        report = await run.learner.update(groups, step, reward_baseline(run, groups))
    run.clock.count("update", sum(num_tokens(g.group.trajectories) for g in groups))
    check_finite(report)
    check_logprob_gap(run, report)
    await run.curriculum.retire(report.failed)  # first: what was observed can be issued again at once
    async with asyncio.TaskGroup() as beside:
        beside.create_task(run.curriculum.observe(groups, step))
        if config.loss.needs.rollouts:
            with run.clock("publish"):
                await publish_weights(run, policy_version=step + 1)
    count_rewards(run, groups)
    run.progress.step = work.step = step + 1
    await buffer.release()  # only now may new prompts enter
    report.metrics.update({"time/step_s": time.monotonic() - started, "learner/wait_s": wait_s})
    report.metrics.update(await evaluate_if_due(run))
    await record(run, outputs, report, groups, lags)
    await save_if_due(run)
    run.state.enter(Phase.RUNNING)


async def train_to_the_end(run: Run) -> None:
    """Evaluates, trains, evaluates, exports; again from the newest checkpoint when the learner is lost."""
    await validate_first(run)
    if run.resume_from is None:
        remove_rounds_after(run, 0)  # of an attempt that ended before its first checkpoint
        run.next_selection = await run.curriculum.next_selection()
        run.state.enter(Phase.RUNNING)
    lost: LearnerLostError | None = None
    while True:
        try:
            if lost:
                await recover(run, lost)
            elif run.resume_from:
                await restore(run)
            if run.published != run.step and run.actors.num_wanted:
                await publish_weights(run, run.step)
            await evaluate_start(run)
            run.clock.take_times()
            started = time.monotonic()
            await train(run)
            run.totals.update({"train_s": time.monotonic() - started})
            await evaluate_end(run)
            return await save_at_end(run)
        except (LearnerLostError, BaseExceptionGroup) as error:
            if not (lost := learner_lost(error)):
                raise


async def execute(
    config: Config,
    folder: Path,
    plan: Plan,
    memory: MemoryPlan,
    resume_from: SavedRun | None,
    trackers: Trackers,
) -> dict[str, Any]:
    """One run from start to summary, from the beginning or from a checkpoint."""
    began = time.monotonic()
    run = create_parts(folder, config, plan, memory, resume_from, trackers)
    async with asyncio.TaskGroup() as tasks, ended_with_ray(run), shutdown_at_end(run):
        beside = [tasks.create_task(watch(run))]
        try:
            await start_parts(run)
            beside += [tasks.create_task(poll_control(run)), tasks.create_task(export_gauges(run))]
            start_up_s = time.monotonic() - began
            await train_to_the_end(run)
            records = await run.curriculum.records()
            write_parquet(records, folder / "curriculum" / "records.parquet")
            return summarise(run, records, {"start_up": start_up_s, "total": time.monotonic() - began})
        finally:
            for task in beside:
                task.cancel()
            run.actors.stop()


def launch(
    config: Config,
    address: str | None = None,
    resume: Path | None = None,
    gpu_memory_gib: float | None = None,
    step: int | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns the summary. resume: a run folder to continue, from its newest checkpoint or `step`'s.

    command: the arguments, for the model card; None: there was no command.

    Raises SaveError, after everything else is written, if the last checkpoint or the student is not.
    """
    with stopped_by_signals(" before the run began") as said:
        local = on_this_node(config, teachers=config.needs_teacher)
        config = pinned(config, local)
        plan = prepare(local, resumes=resume is not None)
        memory = memory_plan(local, plan, gpu_memory_gib)
        check_fits(memory, one_machine=False)
        check_disk(disk_plan(local, memory.student, plan, resume))
        if config.checkpoint_url:
            check_writable(config.checkpoint_url)
        with locked(resume) if resume else new_run_folder(config) as folder:
            saved = saved_run_to_resume(resume, local, plan, step) if resume else None
            try:
                start_ray(config, address)
                check_gpus(memory)
                warn_of_small_stores(memory)
                if saved is None:
                    write_config(folder, config)
                note_command(folder, command, resumes=resume is not None)
                said.text = f": {how_to_resume(folder)}"
                with Trackers(folder, config) as trackers:
                    with driver_log(folder, saved.progress.step if saved else 0):
                        summary = asyncio.run(execute(config, folder, plan, memory, saved, trackers))
                        summary["trackers"] = trackers.states()
                    write_json(folder / "summary.json", summary)
                    write_card(folder, config, summary)
                    trackers.attach(write_report(folder, config, plan.eval.prompts, summary))
                print_summary(folder, summary)
            finally:
                leave_ray()
    if summary["not_saved"]:
        raise SaveError(f"{'; '.join(summary['not_saved'])}; the results are in {folder}")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 bad input, 128 + n stopped by signal n."""
    try:
        parsed = parse_arguments(arguments)
        if parsed.check_cluster:
            return check_cluster(parsed.check_cluster)
        config = read_config(parsed)
        if parsed.dry_run:
            dry_run(config, parsed.gpu_memory_gib, parsed.device, parsed.utilisation)
        else:
            resume, shown = resumed_folder(parsed, config), sys.argv[1:] if arguments is None else arguments
            launch(config, parsed.address, resume, parsed.gpu_memory_gib, parsed.step, shown)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except (VideoOPDError, BaseExceptionGroup) as error:
        cause = first_error(error)
        if isinstance(cause, StoppedError):
            print(cause, file=sys.stderr)
            return cause.exit_code
        if not isinstance(cause, VideoOPDError):
            traceback.print_exception(cause)
            return 1
        print(f"error: {getattr(cause, 'cause', None) or cause}", file=sys.stderr)
        return 2 if isinstance(cause, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
