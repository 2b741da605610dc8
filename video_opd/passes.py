"""Prompts that go together in a call or a pass, and passes over many that leave no engine idle."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

from video_opd.types import Prompt

CALLS_AN_ENGINE = 2  # one is computed, the next one waits there
Results = Sequence[Any]
Arrived = Callable[[Sequence[Prompt], Results], None]  # is told the results of each call as it ends


def cut_of(prompt: Prompt) -> tuple[str, float, float]:
    """The cut of a video that a prompt shows: prompts of one run that have the same one share a clip."""
    return prompt.clip.video_path, prompt.clip.start_s, prompt.clip.duration_s


def by_video(prompts: Sequence[Prompt]) -> list[int]:
    """The places of `prompts`, those of one video, and of one cut of it, next to each other.

    So a clip is read once, and the engines' caches serve its prompts.
    """
    return sorted(range(len(prompts)), key=lambda i: cut_of(prompts[i]))


def calls_by_video(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """The places of `prompts` in calls of at most `size`. A video is split only if it has more prompts."""
    return _parts(prompts, size, lambda prompt: prompt.clip.video_path)


def passes_by_cut(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """The places of `prompts`, in the order of by_video, in passes of at most `size`.

    A cut is split only if it has more prompts: a pass computes once what its prompts share.
    """
    return _parts(prompts, size, cut_of)


def _parts(prompts: Sequence[Prompt], size: int, whole: Callable[[Prompt], Hashable]) -> list[list[int]]:
    """by_video in parts of at most `size`, which split no prompts of one `whole` that fit in a part."""
    parts: list[list[int]] = []
    for _, group in groupby(by_video(prompts), key=lambda i: whole(prompts[i])):
        together = list(group)
        for first in range(0, len(together), size):
            part = together[first : first + size]
            if parts and len(parts[-1]) + len(part) <= size:
                parts[-1] += part
            else:
                parts.append(part)
    return parts


async def ask_by_video(
    prompts: Sequence[Prompt],
    size: int,
    ask: Callable[[Sequence[Prompt]], Awaitable[Results]],
    at_once: Callable[[], Awaitable[int]],
    arrived: Arrived | None = None,
) -> list[Any]:
    """The results of `prompts`, in their order, by calls `ask` of at most `size` prompts.

    A call starts as soon as another ends, `at_once()` of them at a time. Raises what a call raises, after
    `arrived` was told of those that ended before.
    """
    results: list[Any] = [None] * len(prompts)
    left = deque(calls_by_video(prompts, size))
    running: dict[asyncio.Future[Results], list[int]] = {}
    try:
        while left or running:
            free = max(1, await at_once()) - len(running) if left else 0
            for call in [left.popleft() for _ in range(min(free, len(left)))]:
                running[asyncio.ensure_future(ask([prompts[i] for i in call]))] = call
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for answer in sorted(done, key=lambda of_call: of_call.exception() is not None):
                call = running.pop(answer)
                for place, result in zip(call, answer.result(), strict=True):
                    results[place] = result
                if arrived:
                    arrived([prompts[i] for i in call], answer.result())
    finally:
        for of_call in running:
            of_call.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return results
