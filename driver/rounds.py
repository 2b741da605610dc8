"""The curriculum's rounds: teacher and student answer the pool, then prompts are selected."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curriculum import answers as on_disk
from driver.buffer import TrajectoryBuffer
from driver.checkpoints import checkpoint
from driver.divergence import scored_rollouts
from driver.idle_gpus import more_replicas
from driver.passes import shown
from driver.run import Run, ask_student
from driver.saving import try_to_save
from video_opd.errors import ConfigError
from video_opd.grounding import prompt_iou
from video_opd.logs import log
from video_opd.passes import Arrived
from video_opd.schemas import write_parquet
from video_opd.types import FailedPrompt, Prediction, Prompt

ANSWERS_A_PART = 512  # prompts; a run that is killed loses the answers to fewer
Answers = dict[str, list[Prediction]]  # by prompt key
Ask = Callable[[Sequence[Prompt], Arrived], Awaitable[Sequence[Any]]]


async def start_round(run: Run) -> None:
    """Starts the next round: the teacher answers what it has not answered yet, the student everything asked.

    Then writes a checkpoint: asking again would take longer. Raises ConfigError: too few can be selected.
    """
    config, started = run.config.curriculum, time.monotonic()
    asked, size = await run.curriculum.to_ask(run.step), len(run.plan.train)
    if config.pool_sample and len(asked) == config.pool_sample:
        log.info("curriculum.pool_sample: %d of %d prompts are asked in this round", len(asked), size)
    asks_teacher = config.asks_teacher and await validate(run)
    asked = await run.curriculum.to_ask(run.step)
    student_iou, divergence = await ask_round(run, asked)
    try:
        run.next_selection = await run.curriculum.start_round(student_iou, run.step, asked, divergence)
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


async def next_call(run: Run, buffer: TrajectoryBuffer) -> tuple[list[int], list[Prompt]] | None:
    """Free slots, and prompts for them; None when the round needs no more.

    With group_by_video those of one step, and whole videos: slots that no video fits are for the next call.
    """
    config = run.config
    async with buffer.asking:
        by_video = config.curriculum.group_by_video
        slots = await buffer.reserve(None if by_video else config.rollout.prompts_per_call)
        if not slots:
            return None
        prompts = await run.curriculum.next_prompts(len(slots))
        await buffer.give_back(slots[len(prompts) :])
    return slots[: len(prompts)], prompts


async def write_records(run: Run) -> pa.Table:
    """Writes the state of every prompt, as curriculum/round-N.parquet, and returns it."""
    records = await run.curriculum.records()
    number = len(records["student_iou"][0])
    write_parquet(records, run.folder / "curriculum" / f"round-{number}.parquet")
    return records


async def validate(run: Run) -> bool:
    """TRPV: the teacher answers the prompts of the round that it has not answered; False: there are none."""
    asked = await run.curriculum.not_validated(run.step)
    if len(asked):
        await run.curriculum.validate(await teacher_ious(run, asked), asked)
    return len(asked) > 0


async def validate_first(run: Run) -> None:
    """TRPV of the first round, where the learner's GPUs can help, and then the start of the learner."""
    if run.idle_replicas:
        started = time.monotonic()
        await validate(run)
        run.totals.update({"select_s": time.monotonic() - started})
        run.idle_replicas = 0
        await run.learner.start()


async def teacher_ious(run: Run, asked: np.ndarray) -> np.ndarray:
    """float64[P]: tau of the prompts at the places `asked`, NaN where a clip cannot be read.

    Reuses the answers of earlier runs in runs_dir.
    """
    config, teacher, runs_dir = run.config, run.teacher, Path(run.config.runs_dir)
    assert teacher, "the curriculum asks one"
    pool = [run.plan.train[i] for i in asked]
    settings, keys = on_disk.settings_key(config), await asyncio.to_thread(on_disk.prompt_keys, pool, config)
    runs = [run.folder, *sorted(runs_dir.glob("*"))]
    answers = await asyncio.to_thread(on_disk.find_answers, runs, settings, set(keys))
    log.info("teacher answers: %d of %d found in %s", len(answers), len(set(keys)), config.runs_dir)

    async def ask(prompts: Sequence[Prompt], arrived: Arrived) -> Sequence[Any]:
        def count(prompts: Sequence[Prompt], results: Sequence[Any]) -> None:
            run.totals["teacher_answers"] += sum(len(r) for r in results if not isinstance(r, FailedPrompt))
            arrived(prompts, results)

        sampling = on_disk.sampling(config.curriculum.num_teacher_predictions)
        async with more_replicas(run, len(prompts)):
            return await teacher.predict(prompts, *sampling, count)

    parts = run.folder / on_disk.PARTS
    answers = await ask_the_rest(run, dict(zip(keys, pool, strict=True)), answers, (parts, settings), ask)
    file = run.folder / on_disk.FILE
    on_disk.write_answers(file, settings, on_disk.read_answers([file], settings) | answers)
    shutil.rmtree(parts, ignore_errors=True)
    return mean_ious(run, asked, keys, answers)


async def ask_round(run: Run, asked: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """float64[P]: sigma of the current student at the places `asked`, and with scores_student reverse KLs.

    NaN where a clip cannot be read. None: the config asks for none.
    """
    config = run.config.curriculum
    if not config.asks_student:
        return None, None
    prompts = [run.plan.train[i] for i in asked]
    parts = on_disk.student_parts(run.folder, run.step)
    settings = on_disk.student_settings_key(run.config, run.step)
    keys = await asyncio.to_thread(on_disk.student_prompt_keys, prompts, run.config)
    answers = on_disk.read_answers(sorted(parts.glob("part-*.parquet")), settings, set(keys))

    async def ask(prompts: Sequence[Prompt], arrived: Arrived) -> Sequence[Any]:
        if config.scores_student:
            return await scored_rollouts(run, prompts, arrived)
        return await ask_student(run, prompts, arrived, *on_disk.sampling(config.num_student_predictions))

    prompt_of = dict(zip(keys, prompts, strict=True))
    answers = await ask_the_rest(run, prompt_of, answers, (parts, settings), ask)
    divergence = None
    if config.scores_student:
        divergence = mean_by_prompt(run, asked, keys, answers, lambda answer, _: answer.reverse_kl)
    return mean_ious(run, asked, keys, answers), divergence


async def ask_the_rest(
    run: Run, prompt_of: Mapping[str, Prompt], answers: Answers, kept: tuple[Path, str], ask: Ask
) -> Answers:
    """`answers` and, by `ask`, what they lack of `prompt_of`; drops prompts whose clips cannot be read.

    kept: the folder and the settings key under which answers stay until they are used, as they arrive and
    when the pass is interrupted.
    """
    missing = {prompt.prompt_id: key for key, prompt in prompt_of.items() if key not in answers}
    part: Answers = {}

    def keep() -> None:
        if part:
            on_disk.write_part(*kept, part)
            answers.update(part)
            part.clear()

    def arrived(prompts: Sequence[Prompt], results: Sequence[Any]) -> None:
        show(prompts, results)
        answered = zip(prompts, results, strict=True)
        part.update({missing[p.prompt_id]: r for p, r in answered if not isinstance(r, FailedPrompt)})
        if len(part) >= ANSWERS_A_PART:
            keep()

    with shown("answers to the pool", len(missing)) as show:
        try:
            results = await ask([prompt_of[key] for key in missing.values()], arrived) if missing else []
        finally:
            keep()
    await run.curriculum.retire([r for r in results if isinstance(r, FailedPrompt)])
    return answers


def mean_ious(run: Run, asked: np.ndarray, keys: Sequence[str], answers: Answers) -> np.ndarray:
    """float64[P]: the mean IoU of each prompt's answers, NaN without any. asked: places in the pool."""
    reading = run.config.curriculum.multi_span_iou
    return mean_by_prompt(run, asked, keys, answers, lambda a, prompt: prompt_iou(a.spans_s, prompt, reading))


def mean_by_prompt(
    run: Run,
    asked: np.ndarray,
    keys: Sequence[str],
    answers: Answers,
    value: Callable[[Prediction, Prompt], Any],
) -> np.ndarray:
    """float64[P]: the mean of a value of each prompt's answers, NaN without any. See mean_ious."""
    means = np.full(len(run.plan.train), np.nan)
    for i, key in zip(asked, keys, strict=True):
        if key in answers:
            means[i] = np.mean([value(answer, run.plan.train[i]) for answer in answers[key]])
    return means
