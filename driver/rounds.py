"""The curriculum's rounds: teacher and student answer the pool, then prompts are selected."""

import asyncio
import time
from pathlib import Path

import numpy as np

from curriculum.teacher_answers import TEMPERATURE, find_answers, prompt_keys, settings_key, write_answers
from driver.run import Run, ask_student
from video_opd.grounding import prompt_iou
from video_opd.logs import log
from video_opd.schemas import write_parquet
from video_opd.types import FailedPrompt

ANSWERS_A_WRITE = 4096


async def start_round(run: Run) -> None:
    """Starts the next round. The teacher answers the pool once a run, the student once a round."""
    config, started = run.config.curriculum, time.monotonic()
    if run.step == 0 and config.asks_teacher:
        await run.curriculum.validate(await teacher_ious(run))
    student_iou = await student_ious(run) if config.asks_student else None
    run.next_selection = await run.curriculum.start_round(student_iou, run.step)
    records = await run.curriculum.records()
    number = len(records["student_iou"][0])
    write_parquet(records, run.folder / "curriculum" / f"round-{number}.parquet")
    selected, dropped = records["selected"].to_numpy().sum(), (records["dropped"].to_numpy() != "").sum()
    log.info("round %d: %d of %d prompts selected, %d dropped", number, selected, len(records), dropped)
    run.clock.take_times()  # not part of a step
    run.totals.update({"select_s": time.monotonic() - started})


async def teacher_ious(run: Run) -> np.ndarray:
    """float64[P]: tau, NaN where a clip cannot be read. Reuses the answers of earlier runs in runs_dir."""
    config, pool = run.config, run.plan.train
    assert run.teacher, "the curriculum asks one"
    settings, keys = settings_key(config), await asyncio.to_thread(prompt_keys, pool, config)
    prompt_of = dict(zip(keys, pool, strict=True))
    answers = find_answers(sorted(Path(config.runs_dir).iterdir()), settings, set(keys))
    log.info("teacher answers: %d of %d found in %s", len(answers), len(prompt_of), config.runs_dir)
    missing = [key for key in prompt_of if key not in answers]
    for first in range(0, len(missing), ANSWERS_A_WRITE):
        part = missing[first : first + ANSWERS_A_WRITE]
        prompts = [prompt_of[key] for key in part]
        results = await run.teacher.predict(prompts, config.curriculum.num_teacher_predictions, TEMPERATURE)
        new = {k: r for k, r in zip(part, results, strict=True) if not isinstance(r, FailedPrompt)}
        run.totals["teacher_answers"] += sum(len(r) for r in new.values())
        await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
        answers |= new
        write_answers(run.folder, settings, answers)  # all of them: an interrupted run keeps its answers
    write_answers(run.folder, settings, answers)
    reading = config.curriculum.multi_span_iou
    asked = zip(keys, pool, strict=True)
    ious = [[prompt_iou(a.span_s, p, reading) for a in answers.get(key, ())] for key, p in asked]
    return np.array([np.mean(of_prompt) if of_prompt else np.nan for of_prompt in ious])


async def student_ious(run: Run) -> np.ndarray:
    """float64[P]: sigma of the current student, NaN where a clip cannot be read or the prompt is dropped."""
    alive = await run.curriculum.alive()
    results = await ask_student(run, [run.plan.train[i] for i in alive])
    await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
    ious = np.full(len(run.plan.train), np.nan)
    reading = run.config.curriculum.multi_span_iou
    for i, answer in zip(alive, results, strict=True):
        if not isinstance(answer, FailedPrompt):
            ious[i] = prompt_iou(answer.span_s, run.plan.train[i], reading)
    return ious
