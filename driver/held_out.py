"""Evaluations of student and teacher on the held-out split."""

import asyncio
from collections.abc import Iterable, Mapping

from actors.rollout_actor import Answers
from driver.passes import shown
from driver.run import Run, ask_student, unless_stopped
from video_opd.grounding import evaluate
from video_opd.logs import log
from video_opd.types import FailedPrompt

TEACHER, BEFORE, AFTER, NO_VIDEO = "teacher", "student_before", "student_after", "no_video"


def at_step(step: int) -> str:
    return f"step_{step}"


def _steps(names: Iterable[str]) -> dict[int, str]:
    """The names that at_step gave, by their steps."""
    return {int(name.removeprefix("step_")): name for name in names if name.startswith("step_")}


def miou_by_step(run: Run) -> dict[int, float]:
    """The student's mIoU after every step at which it was evaluated, the run's last included."""
    steps = _steps(run.evaluations)
    if AFTER in run.evaluations:
        steps[run.step] = AFTER
    return {step: run.evaluations[name]["miou"] for step, name in steps.items()}


def best_step(miou: Mapping[int, float]) -> int | None:
    """The earliest step with the highest mIoU; None: nothing was evaluated."""
    return min(miou, key=lambda step: (-miou[step], step), default=None)


async def evaluate_student(run: Run, name: str, blank_video: bool = False) -> None:
    """Does nothing in a run without actors, and in one that is told to stop."""
    if not run.actors.num_wanted:
        return
    prompts = run.plan.eval.prompts
    with shown(f"evaluation {name}", len(prompts)) as arrived:
        asking = ask_student(run, prompts, arrived, blank_video=blank_video)
        results = await unless_stopped(run, asking)
    if results is None:
        return
    failed = {f.prompt_id: f.reason for f in results if isinstance(f, FailedPrompt)}
    run.progress.failed_eval.update(run.plan.eval.failed | failed)
    _record(run, name, results)
    log.debug("evaluation %s: mIoU %.3f", name, run.evaluations[name]["miou"])


async def evaluate_start(run: Run) -> None:
    """Teacher and student, once: a student that has been trained is not the one before."""
    due = []
    if TEACHER not in run.evaluations:
        due.append(evaluate_teacher(run))
    if BEFORE not in run.evaluations and run.step == 0:
        due.append(evaluate_student(run, BEFORE))
    await asyncio.gather(*due)


async def evaluate_end(run: Run) -> None:
    """The trained student, unless eval_every has just asked it, and without video."""
    here, examples = at_step(run.step), run.progress.examples
    if here in run.evaluations and here in examples:
        run.evaluations[AFTER], examples[AFTER] = run.evaluations[here], examples[here]
    else:
        await evaluate_student(run, AFTER)
    await evaluate_student(run, NO_VIDEO, blank_video=True)


async def evaluate_if_due(run: Run) -> dict[str, float]:
    """The step's metrics of the evaluation that eval_every asks for; empty: it is not due."""
    if not run.config.eval_every or run.step % run.config.eval_every:
        return {}
    name = at_step(run.step)
    with run.clock("evaluate"):
        await evaluate_student(run, name)
    return {f"eval/{k}": v for k, v in run.evaluations.get(name, {}).items()}


async def evaluate_teacher(run: Run) -> None:
    if run.teacher is not None:
        prompts = run.plan.eval.prompts
        with shown(f"evaluation {TEACHER}", len(prompts)) as arrived:
            results = await run.teacher.predict(prompts, arrived=arrived)
        _record(run, TEACHER, results)


def _record(run: Run, name: str, results: Answers) -> None:
    """Keeps the scores, and the answers but for those of steps that are neither the last nor the best."""
    evaluations, examples = run.progress.evaluations, run.progress.examples
    span_iou = run.config.prompt.span_iou
    answers = [r[0] for r in results if not isinstance(r, FailedPrompt)]
    evaluations[name], examples[name] = evaluate(answers, run.plan.eval.pool, span_iou), answers
    miou = {step: evaluations[of]["miou"] for step, of in _steps(examples).items()}
    for step in miou.keys() - {max(miou, default=None), best_step(miou)}:
        del examples[at_step(step)]
