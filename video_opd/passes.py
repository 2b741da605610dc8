"""Passes over many prompts: which of them go together in a call, and calls that leave no engine idle."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from typing import Any

from video_opd.types import Prompt

CALLS_AN_ENGINE = 2  # one is computed, the next one waits there
Results = Sequence[Any]
Arrived = Callable[[Sequence[Prompt], Results], None]  # is told the results of each call as it ends


def by_video(prompts: Sequence[Prompt]) -> list[int]:
    """The places of `prompts`, those of one video, and of one cut of it, next to each other.

    So a clip is read once, and the engines' caches serve its prompts.
    """
    cuts = [(p.clip.video_path, p.clip.start_s, p.clip.duration_s) for p in prompts]
    return sorted(range(len(cuts)), key=cuts.__getitem__)


def calls_by_video(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """The places of `prompts` in calls of at most `size`. A video is split only if it has more prompts."""
    calls: list[list[int]] = []
    for _, group in groupby(by_video(prompts), key=lambda i: prompts[i].clip.video_path):
        of_video = list(group)
        for first in range(0, len(of_video), size):
            part = of_video[first : first + size]
            if calls and len(calls[-1]) + len(part) <= size:
                calls[-1] += part
            else:
                calls.append(part)
    return calls


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
