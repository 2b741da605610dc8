"""SCC's schedule: a literal reading of arXiv 2609.40055, App. B.2, and the scheduler that follows it."""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.schedule import in_order, make_schedule, step_sizes, target_shares
from curriculum.scheduler import Scheduler, observation
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.errors import CheckpointError, ConfigError
from video_opd.types import FailedPrompt

PAPER = (79, 32)  # num_steps, groups_per_step
QUARTERS = ((1, 20), (21, 40), (41, 59), (60, 79))  # steps of Table 5, counted from 1
rng = np.random.default_rng


@cache
def make_config(num_steps: int, full: int, *overrides: str, lag: int = 0) -> Config:
    sizes = [f"num_steps={num_steps}", f"groups_per_step={full}", f"max_policy_lag={lag}"]
    return load_demo([*sizes, "curriculum.kind=scc", *overrides])


def test_the_target_shares_are_the_papers_at_its_steps_and_linear_between_them():
    shares = target_shares(79)
    assert [shares[step - 1] for step in (1, 20, 40, 60, 79)] == pytest.approx([1, 0.7, 0.3, 0.1, 0.05])
    assert shares[9] == pytest.approx(1 - 0.3 * 9 / 19) and shares[29] == pytest.approx(0.5)
    assert shares.sum() == pytest.approx(32.1), "17 + 9.8 + 3.8 + 1.5 of the four parts, by hand"
    half = target_shares(40)  # the same knots at the same parts of the run: 39 gaps instead of 78
    np.testing.assert_allclose(half, shares[::2])


def test_the_papers_own_schedule():
    """From the text: 1,000 prompts once, 4 again at the end, 1,004 in 79 steps of at most 32, n_t, 1:9.

    Not from the text: how step sizes are rounded. Table 5 counts 534, 307, 116 and 47 presentations (53, 31,
    12, 4 of Anchors); shares in proportion would be 529.6, 305.3, 118.4 and 46.7 + 4.
    """
    config = make_config(*PAPER)
    anchors, frontier = np.arange(100), np.arange(100, 1000)
    order, sizes = make_schedule(anchors, frontier, config, rng(0))
    assert len(sizes) == 79 and sum(sizes) == len(order) == 1004
    assert sorted(order[:1000]) == list(range(1000)), "each once"
    assert set(order[1000:]) <= set(order[: sizes[0]]) - set(anchors), "then Frontier prompts of the start"
    once = [*sizes[:-1], sizes[-1] - 4]
    assert np.abs(once - 1000 / 32.1 * target_shares(79)).max() <= 0.6, "whole prompts of these shares"
    assert [sum(sizes[a - 1 : b]) for a, b in QUARTERS] == [530, 304, 118, 52]
    room = config.schedule_room
    assert room and [room.num_sequences(step) for step in (0, 77, 78)] == [32, 32, 8]
    first = np.cumsum([0, *sizes])
    assert [int((order[first[a - 1] : first[b]] < 100).sum()) for a, b in QUARTERS] == [53, 30, 12, 5]
    assert (room.num_steps, room.most) == (79, 2500)


@given(data=st.data(), num_steps=st.integers(1, 30), full=st.integers(1, 12))
def test_sizes_are_shares_times_one_factor_rounded_and_bounded(data, num_steps, full):
    last = data.draw(st.integers(1, full))
    number = data.draw(st.integers(num_steps, full * (num_steps - 1) + last))
    sizes, shares = step_sizes(number, num_steps, full, last), target_shares(num_steps)
    rooms = [full] * (num_steps - 1) + [last]
    assert sum(sizes) == number and all(1 <= n <= room for n, room in zip(sizes, rooms, strict=True))
    assert sizes == sorted(sizes, reverse=True), "fewer and fewer"
    # the factors that round to these sizes: above, no step gives one away, below, none takes one more
    low = max(((n - 0.5) / s for n, s in zip(sizes, shares, strict=True) if n > 1), default=0.0)
    takes = zip(sizes, shares, rooms, strict=True)
    high = min(((n + 0.5) / s for n, s, room in takes if n < room), default=low + 1)
    assert low <= high
    if high - low > 1e-9:  # else two steps tie, and the earlier is larger
        rounded = np.floor((low + high) / 2 * shares + 0.5)
        assert sizes == np.clip(rounded, 1, rooms).astype(int).tolist()


@given(anchors=st.integers(0, 60), frontier=st.integers(0, 60), data=st.data())
def test_after_each_step_the_share_of_anchors_is_as_near_as_whole_prompts_allow(anchors, frontier, data):
    total = anchors + frontier
    if not total:
        return
    ends = sorted({*data.draw(st.lists(st.integers(1, total), max_size=8)), total})
    sizes = [int(n) for n in np.diff([0, *ends])]
    order = in_order(np.arange(anchors), np.arange(anchors, total), sizes, rng(3))
    assert sorted(order) == list(range(total))
    for end in ends:
        assert abs(int((order[:end] < anchors).sum()) - end * anchors / total) <= 0.5 + 1e-9
    assert total < 30 or list(order) != list(
        in_order(np.arange(anchors), np.arange(anchors, total), sizes, rng(4))
    )


@given(num_steps=st.integers(1, 12), full=st.integers(1, 40), lag=st.integers(0, 3), data=st.data())
def test_nothing_that_can_be_in_flight_is_presented_again(num_steps, full, lag, data):
    config = make_config(num_steps, full, lag=lag)
    room = config.schedule_room
    assert room
    number = data.draw(st.integers(num_steps, room.most))
    anchors = data.draw(st.integers(0, number))
    places = np.arange(number)
    order, sizes = make_schedule(places[:anchors], places[anchors:], config, rng(0))
    assert sum(sizes) == len(order) and max(sizes) <= full and sizes[-1] <= room.last
    in_flight = order[sum(sizes[: max(0, num_steps - 1 - lag)]) :]
    assert len(set(in_flight)) == len(in_flight)
    assert len(order) - number <= room.num_repeats and all(order[number:] >= anchors)


# --- the scheduler ---


def make_scheduler(config: Config, num_prompts: int = 40) -> Scheduler:
    """One prompt in four is an Anchor, one in four is neither."""
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(num_prompts)], config)
    scheduler.validate(np.ones(num_prompts))
    scheduler.start_round(np.tile([0.9, 0.1, 0.5, 0.0], num_prompts // 4), 0)
    return scheduler


def run_steps(scheduler: Scheduler, first: int, until: int, broken: Sequence[str] = ()) -> list[list[str]]:
    """What the loop trains on at lag 0; a prompt that is broken is retired and its slot goes to another."""
    steps = []
    for step, size in enumerate(scheduler.step_sizes(first, until), first):
        names: list[str] = []
        while len(names) < size:
            issued = [p.prompt_id for p in scheduler.next_prompts(size - len(names))]
            failed = [name for name in issued if name in broken]
            scheduler.retire([FailedPrompt(prompt_id=name, reason="broken") for name in failed])
            names += [name for name in issued if name not in failed]
        scheduler.observe([observation(make_group(name)) for name in names], step)
        steps.append(names)
    return steps


SMALL = (9, 8, "curriculum.scc.anchor_frac=0.25")  # 27 of 30 prompts that are Anchors or Frontier


def test_the_scheduler_presents_each_prompt_once_and_a_frontier_prompt_again_at_the_end():
    scheduler = make_scheduler(make_config(*SMALL))
    assert scheduler.next_selection() is None
    steps = run_steps(scheduler, 0, 9)
    counts = Counter(name for step in steps for name in step)
    selected = [r["prompt_id"] for r in scheduler.records().to_pylist() if r["selected"]]
    assert sorted(counts) == sorted(selected) and len(selected) == 26
    (again,) = [name for name, times in counts.items() if times == 2]
    assert again in steps[0] and steps[-1][-1] == again and int(again[1:]) % 4 in (1, 3)
    assert [len(step) for step in steps] == [7, 6, 4, 3, 2, 1, 1, 1, 2]


def test_num_selected_may_be_left_out_and_then_all_that_have_room_are_taken():
    config = make_config(3, 4, "curriculum.scc.anchor_frac=0.25")
    sizes = make_scheduler(config).step_sizes(0, 3)
    assert sizes == [4, 4, 1], "9 of 30"


@given(stop=st.integers(0, 9), seed=st.integers(0, 1000), lag=st.integers(0, 2))
def test_a_run_stopped_anywhere_and_resumed_presents_the_same_prompts_at_the_same_steps(stop, seed, lag):
    config = make_config(*SMALL, lag=lag)
    whole = run_steps(make_scheduler(config), 0, 9)
    scheduler = make_scheduler(config)
    run_steps(scheduler, 0, stop)
    for _ in range(random.Random(seed).randint(0, min(lag, 8 - stop) if stop < 9 else 0)):
        scheduler.next_prompts(sum(scheduler.step_sizes(stop, stop + 1)))  # in flight when it stops
    copy = Scheduler([make_prompt(f"p{i}") for i in range(40)], config)
    copy.load_state_dict(scheduler.state_dict())
    copy.reissue()
    assert run_steps(copy, stop, 9) == whole[stop:]


def test_the_slot_of_a_prompt_that_cannot_be_read_goes_to_the_next_and_the_last_step_is_filled():
    whole = run_steps(make_scheduler(make_config(*SMALL)), 0, 9)
    lost = [whole[0][1], whole[4][0]]
    steps = run_steps(make_scheduler(make_config(*SMALL)), 0, 9, broken=lost)
    assert [len(step) for step in steps] == [len(step) for step in whole]
    expected = [name for step in whole for name in step if name not in lost]
    assert [name for step in steps for name in step][: len(expected)] == expected


def test_a_checkpoint_of_another_schedule_is_refused():
    state = make_scheduler(make_config(*SMALL)).state_dict()
    for other in (
        make_config(10, *SMALL[1:]),
        make_config(9, 4, SMALL[2]),
        make_config(*SMALL, "curriculum.scc.schedule=false"),
    ):
        with pytest.raises(
            CheckpointError, match=r"9 steps of 8.*resume with the curriculum the run was started"
        ):
            Scheduler([make_prompt(f"p{i}") for i in range(40)], other).load_state_dict(state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["curriculum={kind: tvdf, scc: {schedule: true}}"],
            "scc.schedule=true is for kind=scc, not kind=tvdf",
        ),
        (["curriculum.group_by_video=true"], "group_by_video, but .*: set scc.schedule=false"),
        (
            ["curriculum.num_selected=2501"],
            "num_selected=2501, but SCC's schedule of .* has room for 79 to 2500",
        ),
        (
            ["curriculum.num_selected=78"],
            "num_selected=78, but SCC's schedule of num_steps=79 .*: change one",
        ),
    ],
    ids=["another kind", "whole videos", "too many", "too few"],
)
def test_what_the_schedule_cannot_do_is_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(*PAPER, *overrides)
    assert "\n" not in str(caught.value)


def test_fewer_prompts_than_steps_are_an_error_that_says_what_to_do():
    with pytest.raises(
        ConfigError, match=r"26 of 40 prompts are selected, fewer than the 50 steps .*scc.schedule=false"
    ):
        make_scheduler(make_config(50, 2, "curriculum.scc.anchor_frac=0.25"))
