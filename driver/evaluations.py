"""Evaluations of student and teacher on the held-out split."""

from driver.run import Run, ask_student
from video_opd.grounding import evaluate
from video_opd.types import FailedPrompt, Prediction


async def evaluate_student(run: Run, name: str, blank_video: bool = False) -> None:
    if not run.actors.num_wanted:
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
