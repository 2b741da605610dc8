"""Which prompts go together in a call, and calls without a barrier between them."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_prompt
from video_opd.passes import ask_by_video, calls_by_video, passes_by_cut
from video_opd.types import Prompt


def prompts_of(videos: Sequence[int]) -> list[Prompt]:
    return [make_prompt(f"p{i}", clip_id=f"v{video}") for i, video in enumerate(videos)]


@given(videos=st.lists(st.integers(0, 6), max_size=40), size=st.integers(1, 9))
def test_a_call_has_whole_videos_where_they_fit(videos, size):
    calls = calls_by_video(prompts_of(videos), size)
    assert sorted(place for call in calls for place in call) == list(range(len(videos)))
    assert all(0 < len(call) <= size for call in calls)
    for video, number in Counter(videos).items():
        holders = [{videos[i] for i in call} for call in calls if video in {videos[i] for i in call}]
        assert len(holders) == -(-number // size), "no more calls than it needs"
    for one, following in itertools.pairwise(calls):
        shared = {videos[i] for i in one} & {videos[i] for i in following}
        assert shared or len(one) + sum(videos[i] == videos[following[0]] for i in following) > size


def test_cuts_of_one_video_are_next_to_each_other_and_a_pass_splits_none_that_fits():
    prompts = prompts_of([0] * 6)
    cuts = [replace(p, clip=replace(p.clip, start_s=float(i % 2))) for i, p in enumerate(prompts)]
    assert calls_by_video(cuts, 6) == [[0, 2, 4, 1, 3, 5]]
    assert calls_by_video(cuts, 4) == [[0, 2, 4, 1], [3, 5]]
    assert passes_by_cut(cuts, 4) == [[0, 2, 4], [1, 3, 5]]
    assert passes_by_cut(cuts, 2) == [[0, 2], [4], [1, 3], [5]]


def asked(size: int, videos: Sequence[int], answer, at_once=lambda: 2, arrived=None) -> list:
    async def ask(prompts: Sequence[Prompt]) -> list[str]:
        names = [p.prompt_id for p in prompts]
        await answer(names)
        return names

    async def number() -> int:
        return at_once()

    return asyncio.run(asyncio.wait_for(ask_by_video(prompts_of(videos), size, ask, number, arrived), 60))


def test_results_are_in_the_callers_order_and_are_told_as_they_come():
    told: list[list[str]] = []

    async def answer(names: list[str]) -> None:
        await asyncio.sleep(0)

    results = asked(2, [3, 1, 3, 2, 1], answer, arrived=lambda prompts, got: told.append(list(got)))
    assert results == [f"p{i}" for i in range(5)]
    assert sorted(told) == [["p0", "p2"], ["p1", "p4"], ["p3"]]


def test_nobody_waits_for_the_slowest_call():
    """The first call ends only when the last one has begun: with a barrier it would never."""
    begun: list[str] = []
    last = asyncio.Event()

    async def answer(names: list[str]) -> None:
        begun.extend(names)
        if names == ["p5"]:
            last.set()
        if names == ["p0"]:
            await last.wait()

    assert len(asked(1, range(6), answer)) == 6 and begun[0] == "p0"


def test_engines_that_join_or_leave_during_a_pass_count_at_once():
    running, most = Counter(), []
    limits = iter([1, 1, 3, 3, 3, 3, 0, 0, 0, 0])

    async def answer(names: list[str]) -> None:
        running["now"] += 1
        most.append(running["now"])
        await asyncio.sleep(0.001)
        running["now"] -= 1

    asked(1, range(9), answer, at_once=lambda: next(limits, 0))
    assert most[:2] == [1, 1] and max(most) == 3 and most[-1] == 1, "at least one goes on"


def test_what_arrived_before_a_failure_is_told_and_the_rest_is_cancelled():
    told, cancelled = [], []

    async def answer(names: list[str]) -> None:
        if names == ["p1"]:
            raise RuntimeError("lost")
        if names == ["p2"]:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.extend(names)
                raise

    with pytest.raises(RuntimeError, match="lost"):
        asked(1, range(5), answer, lambda: 3, lambda prompts, got: told.extend(got))
    assert (told, cancelled) == (["p0"], ["p2"])
