"""The trajectory buffer: the bound on policy lag as an invariant of simulated runs."""

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.buffer import TrajectoryBuffer
from tests.fakes import make_group
from video_opd.types import ScoredGroup

TIME_LIMIT_S = 20
TURNS = 2_000  # of the event loop; no run here needs a third as many


@dataclass
class History:
    """What a simulated run did."""

    reserved_at: dict[int, int] = field(
        default_factory=dict
    )  # slot -> version published when it was handed out
    steps: list[list[ScoredGroup]] = field(default_factory=list)
    most_in_use: int = 0
    samplers_ended: int = 0

    @property
    def slots(self) -> list[list[int]]:
        return [[int(g.group.prompt.prompt_id) for g in groups] for groups in self.steps]

    @property
    def lags(self) -> list[int]:
        return [
            step - g.group.trajectories[0].policy_version
            for step, groups in enumerate(self.steps)
            for g in groups
        ]


async def simulate(
    sizes: list[int],
    lag: int,
    num_samplers: int,
    per_call: int,
    rng: random.Random,
    learner_delay: int = 4,
) -> History:
    """Samplers and a learner as in launch.train; of the weights there is only the version number."""
    buffer, history = TrajectoryBuffer(sizes, lag), History()
    published, in_use = 0, 0

    async def pause(at_most: int) -> None:
        for _ in range(rng.randint(0, at_most)):
            await asyncio.sleep(0)

    async def sample() -> None:
        nonlocal in_use
        while slots := await buffer.reserve(per_call):
            version = published  # the oldest weights that this call can sample from
            for slot in slots:
                assert slot not in history.reserved_at, f"slot {slot} was handed out twice"
                history.reserved_at[slot] = version
            in_use += len(slots)
            history.most_in_use = max(history.most_in_use, in_use)
            await pause(6)
            while slots:  # some prompts of a call fail, their slots are filled by a later one
                for _ in range(rng.randint(0, len(slots))):
                    slot = slots.pop(0)
                    await buffer.fill(slot, make_group(str(slot), policy_version=version))
                    await pause(1)
                await asyncio.sleep(0)
        history.samplers_ended += 1

    async def learn() -> None:
        nonlocal published, in_use
        for step, size in enumerate(sizes):
            history.steps.append(await buffer.take())
            await pause(learner_delay)
            published = step + 1
            await pause(2)
            in_use -= size
            await buffer.release()

    async def watch() -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)
        raise AssertionError(f"the run stands still after {len(history.steps)} of {len(sizes)} steps")

    async with asyncio.timeout(TIME_LIMIT_S), asyncio.TaskGroup() as tasks:
        watchdog = tasks.create_task(watch())
        await asyncio.gather(
            *(tasks.create_task(part) for part in (learn(), *(sample() for _ in range(num_samplers))))
        )
        watchdog.cancel()
    return history


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    lag=st.integers(0, 3),
    num_samplers=st.integers(1, 4),
    per_call=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
def test_no_trajectory_is_older_than_the_lag_none_is_lost_and_order_is_kept(
    sizes, lag, num_samplers, per_call, seed
):
    history = asyncio.run(simulate(sizes, lag, num_samplers, per_call, random.Random(seed)))
    assert all(0 <= age <= lag for age in history.lags)
    # consumed in the order in which slots were handed out, each slot of the run exactly once
    slots = iter(range(sum(sizes)))
    assert history.slots == [[next(slots) for _ in range(size)] for size in sizes]
    assert sorted(history.reserved_at) == list(range(sum(sizes)))
    assert history.most_in_use <= max(sum(sizes[i : i + lag + 1]) for i in range(len(sizes)))
    assert history.samplers_ended == num_samplers


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_bound_is_reached_when_sampling_outruns_the_learner(lag):
    """Slots are not held back: a slow learner sees exactly the lag it allows."""
    history = asyncio.run(
        simulate([2] * 8, lag, num_samplers=8, per_call=1, rng=random.Random(0), learner_delay=60)
    )
    assert max(history.lags) == lag
    assert history.most_in_use == (lag + 1) * 2


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(TIME_LIMIT_S):
            return await coroutine

    return asyncio.run(bounded())


async def _settle(task: asyncio.Task) -> bool:
    """Whether the task ends when everything that can run has run."""
    for _ in range(20):
        await asyncio.sleep(0)
    return task.done()


def test_slots_become_free_on_release_not_when_they_are_taken():
    async def scenario():
        buffer = TrajectoryBuffer([2] * 2, max_policy_lag=0)
        assert list(await buffer.reserve(5)) == [0, 1]
        waiting = asyncio.create_task(buffer.reserve(5))
        for slot in (0, 1):
            await buffer.fill(slot, make_group(str(slot)))
        await buffer.take()
        assert not await _settle(waiting)
        await buffer.release()
        assert list(await waiting) == [2, 3]

    run(scenario())


def test_take_waits_for_the_oldest_step_and_returns_it_in_the_order_of_slots():
    async def scenario():
        buffer = TrajectoryBuffer([2] * 2, max_policy_lag=1)
        await buffer.reserve(4)
        taking = asyncio.create_task(buffer.take())
        for slot in (3, 2, 1):
            await buffer.fill(slot, make_group(str(slot)))
        assert not await _settle(taking)
        await buffer.fill(0, make_group("0"))
        assert [g.group.prompt.prompt_id for g in await taking] == ["0", "1"]
        assert [g.group.prompt.prompt_id for g in await buffer.take()] == ["2", "3"]

    run(scenario())


def test_waiting_samplers_end_when_another_takes_the_last_slot():
    async def scenario():
        buffer = TrajectoryBuffer([1] * 2, max_policy_lag=0)
        assert list(await buffer.reserve(1)) == [0]
        waiting = [asyncio.create_task(buffer.reserve(1)) for _ in range(3)]
        await buffer.fill(0, make_group("0"))
        await buffer.take()
        await buffer.release()
        assert sorted(len(slots) for slots in await asyncio.gather(*waiting)) == [0, 0, 1]

    run(scenario())


@pytest.mark.parametrize("slot", [0, 2], ids=["filled before", "never reserved"])
def test_a_slot_is_filled_once_and_only_after_it_was_reserved(slot):
    async def scenario():
        buffer = TrajectoryBuffer([2] * 3, max_policy_lag=0)
        await buffer.reserve(2)
        await buffer.fill(0, make_group("0"))
        with pytest.raises(AssertionError, match="not reserved or is filled"):
            await buffer.fill(slot, make_group(str(slot)))

    run(scenario())


def test_the_slots_of_each_step_open_when_the_weights_are_published_whatever_the_steps_sizes():
    async def scenario():
        buffer = TrajectoryBuffer([3, 1, 2], max_policy_lag=1)
        assert await buffer.reserve(9) == [0, 1, 2, 3], "steps 0 and 1"
        await buffer.give_back([2, 3])
        assert await buffer.reserve(None) == [2], "what is left of step 0"
        assert await buffer.reserve(None) == [3], "all of step 1"
        assert buffer.counts() == {"buffer/filled": 0, "buffer/reserved": 4, "buffer/free": 0}
        for slot in range(4):
            await buffer.fill(slot, make_group(str(slot)))
        assert len(await buffer.take()) == 3
        await buffer.release()
        assert buffer.counts() == {"buffer/filled": 1, "buffer/reserved": 0, "buffer/free": 2}
        assert await buffer.reserve(None) == [4, 5], "all of step 2"
        assert await buffer.reserve(9) == [], "the round needs no more"

    run(scenario())
