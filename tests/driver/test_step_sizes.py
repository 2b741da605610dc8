"""Steps of different sizes with the real buffer, scheduler and next_call: SCC's schedule, TVDF's rounds."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.scheduler import Scheduler
from tests.driver.test_whole_videos import History, train
from tests.fakes import make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo

POOL = [make_prompt(f"p{i}") for i in range(40)]
NUM_STEPS = 9


def make_config(lag: int, per_call: int, *overrides: str) -> Config:
    sizes = [f"num_steps={NUM_STEPS}", "groups_per_step=8", f"max_policy_lag={lag}"]
    return load_demo([*sizes, f"rollout.prompts_per_call={per_call}", *overrides])


def make_scheduler(config: Config) -> Scheduler:
    """One prompt in four is an Anchor, one in four is neither."""
    scheduler = Scheduler(POOL, config)
    scheduler.validate(np.ones(len(POOL)))
    scheduler.start_round(np.tile([0.9, 0.1, 0.5, 0.0], 10), 0)
    return scheduler


def steps_of(config: Config, scheduler: Scheduler, until: int, broken: Sequence[str] = ()) -> History:
    return asyncio.run(train(config, scheduler, until, broken))


SCC = ("curriculum.kind=scc", "curriculum.scc.anchor_frac=0.25")


@given(lag=st.integers(0, 2), per_call=st.integers(1, 9), num_broken=st.integers(0, 3))
def test_steps_have_the_schedules_sizes_and_prompts_however_calls_cut_them(lag, per_call, num_broken):
    config = make_config(lag, per_call, *SCC)
    order = [f"p{i}" for i in make_scheduler(config)._queue]
    broken = order[3 : 3 + num_broken]
    steps = steps_of(config, make_scheduler(config), NUM_STEPS, broken).steps
    assert [len(step) for step in steps] == [7, 6, 4, 3, 2, 1, 1, 1, 2]
    trained = [name for step in steps for name in step]
    if not broken:
        assert trained == order
    assert not {*trained} & {*broken} and {*trained} == {*order} - {*broken}
    assert sum(times - 1 for times in Counter(trained).values()) == 1 + num_broken, "they fill the last step"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_run_that_is_restored_in_the_middle_trains_on_the_rest_of_the_schedule(stop, lag):
    config = make_config(lag, 3, *SCC)
    whole = steps_of(config, make_scheduler(config), NUM_STEPS).steps
    scheduler = make_scheduler(config)
    first = steps_of(config, scheduler, stop).steps
    scheduler.next_prompts(2)  # for the next step: lost with the process
    copy = Scheduler(POOL, config)
    copy.load_state_dict(scheduler.state_dict())
    copy.reissue()
    rest = asyncio.run(train(config, copy, NUM_STEPS, first_step=stop)).steps
    assert first + rest == whole


@pytest.mark.parametrize("by_video", [False, True])
@given(lag=st.integers(0, 1), per_call=st.integers(1, 9))
def test_the_last_step_of_a_round_is_smaller_and_each_selected_prompt_is_trained_on_once(
    by_video, lag, per_call
):
    more = [f"curriculum.group_by_video={by_video}", "curriculum.num_selected=21"]
    config = make_config(lag, per_call, "curriculum.kind=tvdf", *more)
    scheduler = make_scheduler(config)
    assert scheduler.next_selection() == 3
    steps = steps_of(config, scheduler, 3).steps
    assert [len(step) for step in steps] == [8, 8, 5]
    assert len({name for step in steps for name in step}) == 21
