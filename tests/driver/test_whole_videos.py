"""curriculum.group_by_video with the real buffer and scheduler: whole videos in a step and in a call."""

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.scheduler import Scheduler, observation
from curriculum.videos import next_videos
from driver.buffer import TrajectoryBuffer
from driver.rounds import next_call
from tests.driver.test_rounds import Local
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_curriculum import CurriculumConfig
from video_opd.config_file import load_demo
from video_opd.types import FailedPrompt, Prompt

TIME_LIMIT_S = 60
demo = cache(load_demo)


def make_config(groups_per_step: int, per_call: int, lag: int = 0, seed: int = 0) -> Config:
    config = demo(())
    rollout = config.rollout.model_copy(update={"prompts_per_call": per_call})
    update = {"groups_per_step": groups_per_step, "max_policy_lag": lag, "seed": seed, "rollout": rollout}
    return config.model_copy(update=update | {"curriculum": CurriculumConfig(group_by_video=True)})


def make_pool(sizes: Sequence[int]) -> list[Prompt]:
    """`sizes`: prompts of each video."""
    return [make_prompt(f"{v}-{i}", clip_id=f"v{v}") for v, size in enumerate(sizes) for i in range(size)]


def video_of(prompt_id: str) -> int:
    return int(prompt_id.partition("-")[0])


@dataclass
class History:
    """What was sampled: prompt ids."""

    calls: list[list[str]] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)


async def train(
    config: Config, scheduler: Scheduler, until: int, broken: Sequence[str] = (), first_step: int = 0
) -> History:
    """As launch.train_round does, with actors that answer after some turns of the event loop."""
    history, rng = History(), random.Random(config.seed)
    run: Any = SimpleNamespace(config=config, curriculum=Local(scheduler))
    sizes = scheduler.step_sizes(first_step, until)
    buffer = TrajectoryBuffer(sizes, config.max_policy_lag)

    async def sample() -> None:
        while call := await next_call(run, buffer):
            slots, prompts = call
            while slots:
                prompts = prompts or scheduler.next_prompts(len(slots))
                names = [p.prompt_id for p in prompts]
                history.calls.append(names)
                for _ in range(rng.randint(0, 5)):
                    await asyncio.sleep(0)
                failed = {name for name in names if name in broken}
                scheduler.retire([FailedPrompt(prompt_id=name, reason="broken") for name in failed])
                slot_of = dict(zip(names, slots, strict=False))
                for name in slot_of.keys() - failed:
                    await buffer.fill(slot_of.pop(name), make_group(name))
                slots, prompts = [*slot_of.values(), *slots[len(names) :]], []

    async def learn() -> None:
        for step in range(first_step, until):
            groups = await buffer.take()
            history.steps.append([g.group.prompt.prompt_id for g in groups])
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
            scheduler.observe([observation(g) for g in groups], step)
            await buffer.release()
        await buffer.close()

    async with asyncio.timeout(TIME_LIMIT_S):
        await asyncio.gather(learn(), *(sample() for _ in range(config.most_calls)))
    return history


def holders(parts: Sequence[Sequence[str]]) -> dict[int, list[int]]:
    """For each video the places of the parts that have prompts of it, in order."""
    found = defaultdict(set)
    for place, part in enumerate(parts):
        for name in part:
            found[video_of(name)].add(place)
    return {video: sorted(places) for video, places in found.items()}


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=20),
    groups_per_step=st.integers(1, 6),
    per_call=st.integers(1, 9),
    lag=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_a_video_is_in_one_step_and_one_call_where_it_fits(sizes, groups_per_step, per_call, lag, seed):
    config = make_config(groups_per_step, per_call, lag, seed)
    num_steps = sum(sizes) // groups_per_step
    history = asyncio.run(train(config, Scheduler(make_pool(sizes), config), num_steps))
    assert [len(step) for step in history.steps] == [groups_per_step] * num_steps
    issued = [name for call in history.calls for name in call]
    assert sorted(issued) == sorted(n for step in history.steps for n in step)
    assert len(set(issued)) == len(issued), "each prompt once a pass"
    in_steps, first_step = holders(history.steps), {}
    for video, steps in in_steps.items():
        first_step[video] = steps[0]
        assert steps == list(range(steps[0], steps[-1] + 1)), "what is left of a video comes next"
    for step in range(num_steps - 1):
        cut = [video for video, steps in in_steps.items() if step in steps and step + 1 in steps]
        assert len(cut) <= 1
        for video in cut:
            room = sum(video_of(name) == video for name in history.steps[step])
            later = [sizes[v] for v, first in first_step.items() if first > step]
            assert sizes[video] > groups_per_step or all(size > room for size in later), "none fits there"
    step_of = {name: step for step, names in enumerate(history.steps) for name in names}
    for call in history.calls:
        assert len(call) <= per_call or len({video_of(name) for name in call}) == 1
        assert len({step_of[name] for name in call}) == 1
        videos = [video for video, _ in groupby(call, key=video_of)]
        assert len(set(videos)) == len(videos), "a video's prompts are next to each other"
    for video, calls in holders(history.calls).items():
        assert len(calls) == len(in_steps[video]), "the prompts of a video in a step are in one call"


def test_videos_that_fill_a_step_are_never_split_in_many_passes():
    config = make_config(groups_per_step=6, per_call=4, lag=2)
    scheduler = Scheduler(make_pool([3] * 12), config)
    history = asyncio.run(train(config, scheduler, 24))
    assert all(sorted(Counter(map(video_of, step)).values()) == [3, 3] for step in history.steps)
    assert {tuple(Counter(map(video_of, call)).values()) for call in history.calls} == {(3,)}
    counts = Counter(name for step in history.steps for name in step)
    assert set(counts.values()) == {4} and len(counts) == 36


def test_the_slots_of_a_broken_video_go_to_another_video():
    config = make_config(groups_per_step=4, per_call=8)
    scheduler = Scheduler(make_pool([2] * 6), config)
    history = asyncio.run(train(config, scheduler, 2, broken=["0-0", "0-1"]))
    assert all(sorted(Counter(map(video_of, step)).values()) == [2, 2] for step in history.steps)
    assert all(len({video_of(name) for name in call}) == len(call) / 2 for call in history.calls)


def test_a_video_that_does_not_fit_is_passed_over_in_the_step_that_has_begun_alone():
    config = make_config(groups_per_step=4, per_call=8)
    scheduler = Scheduler(make_pool([3, 2, 2, 2, 3, 9]), config)
    scheduler._queue.extend(range(21))
    steps = asyncio.run(train(config, scheduler, 5)).steps
    assert [sorted(Counter(map(video_of, step)).items()) for step in steps] == [
        [(0, 3), (1, 1)],  # no video has one prompt
        [(1, 1), (2, 2), (3, 1)],
        [(3, 1), (4, 3)],
        [(5, 4)],
        [(5, 4)],
    ]


@pytest.mark.parametrize(
    ("queue", "room", "per_call", "issued", "left"),
    [
        ([10, 11, 20, 21], 3, 8, [10, 11, 20], [21]),
        ([10, 11, 20, 21, 30], 3, 8, [10, 11, 30], [20, 21]),
        ([10, 11, 20, 21], 4, 3, [10, 11], [20, 21]),
        ([10, 11, 12, 20], 4, 2, [10, 11, 12], [20]),
        ([50, 51, 10, 11], 2, 8, [10, 11], [50, 51]),
        ([50, 51], 2, 8, [], [50, 51]),
        ([90, 10, 91, 92, 11], 4, 8, [10, 11], []),
        ([10, 11, 10, 11, 20], 4, 8, [10, 11, 20], [10, 11]),
    ],
    ids=["fills", "passes over", "ends", "is larger", "in flight", "all in flight", "dropped", "two passes"],
)
def test_what_a_call_takes_of_the_queue(queue, room, per_call, issued, left):
    """Of video v are the places 10 v to 10 v + 9. 51 is in flight, all of video 9 are dropped."""
    video, waiting = np.arange(100) // 10, deque(queue)
    dropped = np.where(video == 9, "broken", "")
    assert next_videos(waiting, room, per_call, False, video, dropped, {51}) == issued
    assert list(waiting) == left


def test_prompts_of_videos_in_flight_are_issued_one_by_one_in_calls_of_the_usual_size():
    scheduler = Scheduler(make_pool([5]), make_config(groups_per_step=4, per_call=2))
    scheduler._queue.extend(range(5))
    scheduler._in_flight[0] = None
    calls = [scheduler.next_prompts(room) for room in (4, 2)]
    assert [[p.prompt_id for p in call] for call in calls] == [["0-1", "0-2"], ["0-3", "0-4"]]


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_stops_within_a_video_goes_on_where_it_was(stop):
    config = make_config(groups_per_step=4, per_call=2, seed=stop)
    pool = make_pool([5, 3, 1, 6, 2, 3, 4])
    scheduler = Scheduler(pool, config)
    asyncio.run(train(config, scheduler, stop))
    lost = scheduler.next_prompts(4)
    other = Scheduler(pool, config)
    other.load_state_dict(scheduler.state_dict())
    for one in (other, scheduler):
        one.reissue()
    steps = [asyncio.run(train(config, one, 6)).steps for one in (other, scheduler)]
    assert steps[0] == steps[1]
    assert {p.prompt_id for p in lost} <= set(steps[0][0])
