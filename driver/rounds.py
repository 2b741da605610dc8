"""The curriculum's rounds: teacher and student answer the pool, then prompts are selected."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from curriculum import answers as on_disk
from driver.checkpoints import checkpoint
from driver.run import Run, ask_student
from driver.saving import try_to_save
from video_opd.errors import ConfigError
from video_opd.grounding import prompt_iou
from video_opd.logs import log
from video_opd.schemas import write_parquet
from video_opd.types import FailedPrompt, Prediction, Prompt

ANSWERS_A_PART = 512  # prompts; an interrupted run loses the answers to fewer
Answers = dict[str, list[Prediction]]  # by prompt key
Ask = Callable[[Sequence[Prompt]], Awaitable[Sequence[list[Prediction] | FailedPrompt]]]


async def start_round(run: Run) -> None:
    """Starts the next round. The teacher answers the pool once a run, the student once a round.

    Then writes a checkpoint: asking again would take longer. Raises ConfigError: too few can be selected.
    """
    config, started = run.config.curriculum, time.monotonic()
    if asks_teacher := run.step == 0 and config.asks_teacher:
        await run.curriculum.validate(await teacher_ious(run))
    student_iou = await student_ious(run) if config.asks_student else None
    try:
        run.next_selection = await run.curriculum.start_round(student_iou, run.step)
    except ConfigError:
        await write_records(run)  # they say why each prompt was dropped
        raise
    records = await write_records(run)
    selected, dropped = records["selected"].to_numpy().sum(), (records["dropped"].to_numpy() != "").sum()
    number = len(records["student_iou"][0])
    log.info("round %d: %d of %d prompts selected, %d dropped", number, selected, len(records), dropped)
    run.totals.update({"select_s": time.monotonic() - started})
    if (asks_teacher or config.asks_student) and not await try_to_save(run, checkpoint, "checkpoint"):
        on_disk.forget_student_answers(run.folder)
    run.clock.take_times()  # not part of a step


async def write_records(run: Run) -> pa.Table:
    """Writes the state of every prompt, as curriculum/round-N.parquet, and returns it."""
    records = await run.curriculum.records()
    number = len(records["student_iou"][0])
    write_parquet(records, run.folder / "curriculum" / f"round-{number}.parquet")
    return records


async def teacher_ious(run: Run) -> np.ndarray:
    """float64[P]: tau, NaN where a clip cannot be read or the prompt is dropped.

    Reuses the answers of earlier runs in runs_dir.
    """
    config, teacher, runs_dir = run.config, run.teacher, Path(run.config.runs_dir)
    assert teacher, "the curriculum asks one"
    alive = await run.curriculum.alive()
    pool = [run.plan.train[i] for i in alive]
    settings, keys = on_disk.settings_key(config), await asyncio.to_thread(on_disk.prompt_keys, pool, config)
    runs = [run.folder, *sorted(runs_dir.glob("*"))]
    answers = await asyncio.to_thread(on_disk.find_answers, runs, settings, set(keys))
    log.info("teacher answers: %d of %d found in %s", len(answers), len(set(keys)), config.runs_dir)

    async def ask(prompts: Sequence[Prompt]) -> Sequence[list[Prediction] | FailedPrompt]:
        number, temperature = config.curriculum.num_teacher_predictions, on_disk.TEMPERATURE
        results = await teacher.predict(prompts, number, temperature)
        run.totals["teacher_answers"] += sum(len(r) for r in results if not isinstance(r, FailedPrompt))
        return results

    parts = run.folder / on_disk.PARTS
    answers = await answer_in_parts(run, dict(zip(keys, pool, strict=True)), answers, (parts, settings), ask)
    on_disk.write_answers(run.folder / on_disk.FILE, settings, answers)
    shutil.rmtree(parts, ignore_errors=True)
    return mean_ious(run, alive, keys, answers)


async def student_ious(run: Run) -> np.ndarray:
    """float64[P]: sigma of the current student, NaN where a clip cannot be read or the prompt is dropped."""
    alive = await run.curriculum.alive()
    prompts = [run.plan.train[i] for i in alive]
    parts = on_disk.student_parts(run.folder, run.step)
    settings = on_disk.student_settings_key(run.config, run.step)
    keys = await asyncio.to_thread(on_disk.student_prompt_keys, prompts, run.config)
    answers = on_disk.read_answers(sorted(parts.glob("part-*.parquet")), settings, set(keys))

    async def ask(prompts: Sequence[Prompt]) -> Sequence[list[Prediction] | FailedPrompt]:
        return [r if isinstance(r, FailedPrompt) else [r] for r in await ask_student(run, prompts)]

    prompt_of = dict(zip(keys, prompts, strict=True))
    answers = await answer_in_parts(run, prompt_of, answers, (parts, settings), ask)
    return mean_ious(run, alive, keys, answers)


async def answer_in_parts(
    run: Run, prompt_of: Mapping[str, Prompt], answers: Answers, kept: tuple[Path, str], ask: Ask
) -> Answers:
    """`answers` and, by `ask`, what they lack of `prompt_of`; drops prompts whose clips cannot be read.

    kept: the folder and the settings key under which each part stays until the answers are used.
    """
    missing = [key for key in prompt_of if key not in answers]
    for first in range(0, len(missing), ANSWERS_A_PART):
        part = missing[first : first + ANSWERS_A_PART]
        results = await ask([prompt_of[key] for key in part])
        new = {k: r for k, r in zip(part, results, strict=True) if not isinstance(r, FailedPrompt)}
        on_disk.write_part(*kept, new)
        answers |= new
        await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
    return answers


def mean_ious(run: Run, asked: np.ndarray, keys: Sequence[str], answers: Answers) -> np.ndarray:
    """float64[P]: the mean IoU of each prompt's answers, NaN without any. asked: places in the pool."""
    ious, reading = np.full(len(run.plan.train), np.nan), run.config.curriculum.multi_span_iou
    for i, key in zip(asked, keys, strict=True):
        if key in answers:
            ious[i] = np.mean([prompt_iou(a.span_s, run.plan.train[i], reading) for a in answers[key]])
    return ious
