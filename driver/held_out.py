"""Evaluations of student and teacher on the held-out split."""

import hashlib
from collections.abc import Sequence

from driver.run import Run, ask_student, unless_stopped
from video_opd.grounding import evaluate
from video_opd.logs import log
from video_opd.types import FailedPrompt, Prediction, Prompt

TEACHER, BEFORE, AFTER, NO_VIDEO = "teacher", "student_before", "student_after", "no_video"


def at_step(step: int) -> str:
    """The name of the evaluation at the end of `step` updates."""
    return f"step_{step}"


def miou_by_step(run: Run) -> dict[int, float]:
    """Of all steps after which the student was evaluated, the last of the run included."""
    steps = {int(name.removeprefix("step_")): name for name in run.evaluations if name.startswith("step_")}
    if AFTER in run.evaluations:
        steps[run.step] = AFTER
    return {step: run.evaluations[name]["miou"] for step, name in steps.items()}


def eval_key(prompts: Sequence[Prompt]) -> str:
    """Of a held-out split: figures can be compared where it is the same."""
    return hashlib.blake2b(
        repr([(p.prompt_id, p.answer_spans_s) for p in prompts]).encode(), digest_size=16
    ).hexdigest()


async def evaluate_student(run: Run, name: str, blank_video: bool = False) -> None:
    if not run.actors.num_wanted:
        return
    results = await unless_stopped(run, ask_student(run, run.plan.eval, blank_video))
    if results is None:
        return
    run.failed_eval.update({f.prompt_id: f.reason for f in results if isinstance(f, FailedPrompt)})
    answers = [p for p in results if isinstance(p, Prediction)]
    run.evaluations[name], run.examples[name] = evaluate(answers, run.plan.eval), answers
    log.debug("evaluation %s: mIoU %.3f", name, run.evaluations[name]["miou"])


async def evaluate_teacher(run: Run) -> None:
    if run.teacher is None:
        return
    answers = [a[0] for a in await run.teacher.predict(run.plan.eval) if not isinstance(a, FailedPrompt)]
    run.evaluations["teacher"], run.examples["teacher"] = evaluate(answers, run.plan.eval), answers
