"""The scheduler without Ray: shuffled passes, prompts in flight, resuming, and TVDF selection."""

import json
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.scheduler import Scheduler
from tests.fakes import make_group, make_prompt
from video_opd.config import CurriculumConfig
from video_opd.errors import ConfigError, RunError
from video_opd.types import FailedPrompt


def make_scheduler(num_prompts: int, seed: int = 0, **options) -> Scheduler:
    return Scheduler([make_prompt(f"p{i}") for i in range(num_prompts)], CurriculumConfig(**options), seed)


def issue(scheduler: Scheduler, n: int) -> list[str]:
    return [p.prompt_id for p in scheduler.next_prompts(n)]


def train(scheduler: Scheduler, prompt_ids: Sequence[str], step: int = 0, rollouts: int = 1) -> None:
    scheduler.observe([make_group(p, [3] * rollouts) for p in prompt_ids], step)


def issue_and_train(scheduler: Scheduler, n: int, calls: int) -> list[str]:
    """What `calls` calls issue when each is trained on before the next."""
    issued = []
    for step in range(calls):
        prompt_ids = issue(scheduler, n)
        train(scheduler, prompt_ids, step)
        issued += prompt_ids
    return issued


@given(per_call=st.integers(1, 5), calls_per_pass=st.integers(1, 5), seed=st.integers(0, 1000))
def test_each_pass_issues_every_prompt_once(per_call, calls_per_pass, seed):
    pool = per_call * calls_per_pass
    issued = issue_and_train(make_scheduler(pool, seed), per_call, 4 * calls_per_pass)
    passes = [issued[i : i + pool] for i in range(0, len(issued), pool)]
    assert all(sorted(one) == sorted(f"p{i}" for i in range(pool)) for one in passes) and len(passes) == 4


@given(pool=st.integers(1, 12), data=st.data())
def test_calls_that_cross_passes_never_let_a_prompt_get_ahead(pool, data):
    scheduler = make_scheduler(pool)
    counts = Counter({f"p{i}": 0 for i in range(pool)})
    for _ in range(20):
        prompt_ids = issue(scheduler, data.draw(st.integers(1, pool)))
        assert len(set(prompt_ids)) == len(prompt_ids)
        train(scheduler, prompt_ids)
        counts.update(prompt_ids)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_passes_are_shuffled_differently():
    issued = issue_and_train(make_scheduler(30), 30, 2)
    in_order = [f"p{i}" for i in range(30)]
    assert issued[:30] != in_order and issued[30:] != in_order and issued[:30] != issued[30:]


@given(pool=st.integers(4, 12), seed=st.integers(0, 10_000))
def test_a_prompt_is_never_in_flight_twice_and_a_retired_one_is_never_issued_again(pool, seed):
    rng = random.Random(seed)
    scheduler = make_scheduler(pool)
    in_flight: list[str] = []
    retired: set[str] = set()
    for step in range(40):
        n = rng.randint(0, pool - len(retired) - len(in_flight))
        issued = issue(scheduler, n)
        assert len(issued) == n
        assert not set(issued) & (set(in_flight) | retired)
        in_flight += issued
        rng.shuffle(in_flight)
        cut = rng.randint(0, len(in_flight))
        finished, in_flight = in_flight[:cut], in_flight[cut:]
        failed = finished[:1] if rng.random() < 0.1 and len(retired) < pool - 1 else []
        scheduler.retire([FailedPrompt(prompt_id=p, reason="broken") for p in failed])
        retired |= set(failed)
        train(scheduler, [p for p in finished if p not in failed], step)
        assert scheduler.metrics()["curriculum/in_flight"] == len(in_flight)
    assert {r.prompt_id for r in scheduler.records() if r.dropped} == retired


@given(pool=st.integers(4, 12), in_flight=st.integers(1, 4), seed=st.integers(0, 1000))
def test_a_prompt_passed_over_while_in_flight_keeps_its_turn(pool, in_flight, seed):
    """A pipeline that always has some prompts under way serves all prompts alike."""
    scheduler, counts = make_scheduler(pool, seed), Counter({f"p{i}": 0 for i in range(pool)})
    window = issue(scheduler, in_flight)
    for step in range(10 * pool):
        train(scheduler, [window.pop(0)], step)
        window += issue(scheduler, 1)
        counts[window[-1]] += 1
    assert max(counts.values()) - min(counts.values()) <= 2


@given(seed=st.integers(0, 1000))
def test_prompts_passed_over_while_in_flight_come_next_in_the_order_of_their_pass(seed):
    undisturbed, scheduler = make_scheduler(8, seed), make_scheduler(8, seed)
    second_pass = issue_and_train(undisturbed, 8, 2)[8:]
    first = issue(scheduler, 8)
    train(scheduler, first[:6])
    assert issue(scheduler, 6) == [p for p in second_pass if p not in first[6:]]
    train(scheduler, first)
    assert issue(scheduler, 2) == [p for p in second_pass if p in first[6:]]


def test_the_seed_alone_decides_the_order():
    orders = [issue_and_train(make_scheduler(20, seed), 3, 20) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_retired_prompt_is_counted_with_its_reason_and_replaced_by_another():
    scheduler = make_scheduler(3)
    first = issue(scheduler, 1)
    scheduler.retire([FailedPrompt(prompt_id=first[0], reason="video x cannot be decoded")])
    assert sorted(issue(scheduler, 2)) == sorted({"p0", "p1", "p2"} - set(first))
    assert {r.prompt_id: r.dropped for r in scheduler.records() if r.dropped} == {first[0]: "video x cannot be decoded"}
    assert scheduler.metrics()["curriculum/dropped"] == 1


def test_too_few_prompts_left_ends_the_run_in_one_line():
    scheduler = make_scheduler(4)
    issued = issue(scheduler, 3)
    scheduler.retire([FailedPrompt(prompt_id=issued[0], reason="broken")])
    with pytest.raises(RunError, match=r"0 prompts that are not in flight, 1 more .* \(1 of 4 were dropped\)") as caught:
        issue(scheduler, 2)
    assert "\n" not in str(caught.value)


def test_records_count_rollouts_and_the_last_step_in_the_order_of_the_pool():
    scheduler = make_scheduler(3)
    train(scheduler, issue(scheduler, 3), step=4, rollouts=2)
    second = issue(scheduler, 1)
    train(scheduler, second, step=5, rollouts=3)
    records = scheduler.records()
    assert [r.prompt_id for r in records] == ["p0", "p1", "p2"]
    assert {r.prompt_id: (r.num_rollouts, r.last_step) for r in records} == {
        p: (5, 5) if p in second else (2, 4) for p in ("p0", "p1", "p2")
    }
    assert [(r.teacher_iou, r.student_iou, r.selected, r.dropped) for r in records] == [(None, None, True, "")] * 3


def test_seen_share_is_over_the_selected_prompts():
    scheduler = make_scheduler(4)
    assert scheduler.metrics()["curriculum/seen_frac"] == 0.0
    train(scheduler, issue(scheduler, 3))
    assert scheduler.metrics()["curriculum/seen_frac"] == 0.75


def restored(state: dict, num_prompts: int, **options) -> Scheduler:
    """A fresh scheduler with the state, which has been through JSON as in a checkpoint; another seed, to be overwritten."""
    rest = json.loads(json.dumps({k: v for k, v in state.items() if k != "records"}))
    scheduler = make_scheduler(num_prompts, seed=999, **options)
    scheduler.load_state_dict(rest | {"records": state["records"]})
    return scheduler


@given(pool=st.integers(1, 12), data=st.data())
def test_a_restored_scheduler_goes_on_in_the_same_order(pool, data):
    per_call = data.draw(st.integers(1, pool))
    scheduler = make_scheduler(pool, seed=data.draw(st.integers(0, 1000)))
    issue_and_train(scheduler, per_call, data.draw(st.integers(0, 15)))
    copy = restored(scheduler.state_dict(), pool)
    assert copy.records() == scheduler.records()
    assert issue_and_train(copy, per_call, 3 * pool) == issue_and_train(scheduler, per_call, 3 * pool)
    assert copy.state_dict() == scheduler.state_dict()


def test_retired_and_selected_prompts_are_restored():
    scheduler = make_scheduler(6, kind="tvdf", num_selected=4)
    scheduler.start_round({f"p{i}": 0.9 for i in range(6)}, {f"p{i}": 0.1 * i for i in range(6)})
    scheduler.retire([FailedPrompt(prompt_id="p1", reason="broken")])
    copy = restored(scheduler.state_dict(), 6, kind="tvdf", num_selected=4)
    assert copy.records() == scheduler.records()
    assert sorted(issue_and_train(copy, 1, 3)) == ["p0", "p2", "p3"]


def test_prompts_in_flight_are_issued_first_after_a_restart_and_the_pass_goes_on():
    scheduler = make_scheduler(10)
    done = issue(scheduler, 3)
    in_flight = issue(scheduler, 4)
    train(scheduler, done)
    copy = restored(scheduler.state_dict(), 10)
    assert copy.metrics()["curriculum/in_flight"] == 0
    rest = issue_and_train(copy, 1, 7)
    assert rest[:4] == in_flight
    assert sorted(done + rest) == sorted(f"p{i}" for i in range(10))


def test_a_prompt_in_flight_at_a_restart_keeps_its_turn_in_the_pass_that_has_begun():
    """Trained on twice in two passes, as every other prompt is."""
    scheduler = make_scheduler(4)
    early, late = issue(scheduler, 3), issue(scheduler, 1)
    train(scheduler, early)
    started = issue(scheduler, 1)  # of the second pass; `late` is still in flight from the first
    trained = Counter(early)
    copy = restored(scheduler.state_dict(), 4)
    assert issue(copy, 2) == [*late, *started]
    train(copy, [*late, *started])
    trained.update([*late, *started, *issue_and_train(copy, 1, 3)])
    assert set(trained.values()) == {2}, trained


ious = st.floats(0, 1)


@given(data=st.data(), scores=st.lists(st.tuples(ious, ious), min_size=1, max_size=15), threshold=st.floats(0, 0.9))
def test_tvdf_selects_the_largest_disagreements_among_prompts_the_teacher_gets_right(data, scores, threshold):
    reliable = [i for i, (tau, _) in enumerate(scores) if tau >= threshold]
    if not reliable:
        reliable, scores = [0], [(0.95, 0.0), *scores[1:]]
    k = data.draw(st.integers(1, len(reliable)))
    by_disagreement = sorted(reliable, key=lambda i: (scores[i][1] - scores[i][0], i))
    expected = {f"p{i}" for i in by_disagreement[:k]}

    scheduler = make_scheduler(len(scores), kind="tvdf", num_selected=k, teacher_threshold=threshold)
    tau, sigma = ({f"p{i}": pair[part] for i, pair in enumerate(scores)} for part in (0, 1))
    assert scheduler.start_round(tau, sigma) == k
    assert set(issue_and_train(scheduler, 1, 2 * k)) == expected
    for i, record in enumerate(scheduler.records()):
        assert (record.teacher_iou, record.student_iou) == scores[i]
        assert record.selected == (f"p{i}" in expected)
        assert bool(record.dropped) == (i not in reliable)


def test_tvdf_by_hand():
    scheduler = make_scheduler(5, kind="tvdf", num_selected=2, teacher_threshold=0.7)
    tau = {"p0": 0.9, "p1": 0.7, "p2": 0.69, "p3": 1.0, "p4": 0.8}
    sigma = {"p0": 0.8, "p1": 0.1, "p2": 0.0, "p3": 0.9, "p4": 0.5}  # disagreements 0.1, 0.6, dropped, 0.1, 0.3
    scheduler.start_round(tau, sigma)
    assert [r.prompt_id for r in scheduler.records() if r.selected] == ["p1", "p4"]
    assert {r.prompt_id: r.dropped for r in scheduler.records() if r.dropped} == {"p2": "teacher IoU 0.690 is below 0.7"}


def test_tvdf_without_a_number_selects_all_that_are_reliable():
    scheduler = make_scheduler(4, kind="tvdf", teacher_threshold=0.5)
    assert scheduler.start_round({"p0": 0.5, "p1": 0.4, "p2": 1.0, "p3": 0.9}, dict.fromkeys(("p0", "p1", "p2", "p3"), 0.0)) == 3
    assert sorted(issue_and_train(scheduler, 3, 1)) == ["p0", "p2", "p3"]


def test_a_prompt_without_a_prediction_is_dropped():
    scheduler = make_scheduler(3, kind="tvdf")
    assert scheduler.start_round({"p0": 0.9, "p1": 0.9}, {"p0": 0.1, "p2": 0.1}) == 1
    assert [bool(r.dropped) for r in scheduler.records()] == [False, True, True]
    assert [r.teacher_iou for r in scheduler.records()] == [0.9, 0.9, None]


def test_a_round_replaces_what_was_queued_before():
    scheduler = make_scheduler(6, kind="tvdf", num_selected=2)
    issue_and_train(scheduler, 1, 2)
    scheduler.start_round(dict.fromkeys((f"p{i}" for i in range(6)), 0.9), {f"p{i}": 0.1 * i for i in range(6)})
    assert set(issue_and_train(scheduler, 1, 8)) == {"p0", "p1"}


@pytest.mark.parametrize(
    ("threshold", "num_selected", "reached"),
    [(0.95, None, 0), (0.95, 2, 0), (0.5, 4, 3)],
    ids=["all dropped", "all dropped, a number asked for", "fewer than asked for"],
)
def test_a_threshold_that_leaves_too_few_prompts_is_an_error_of_the_config_in_one_line(threshold, num_selected, reached):
    scheduler = make_scheduler(4, kind="tvdf", teacher_threshold=threshold, num_selected=num_selected)
    tau = {"p0": 0.6, "p1": 0.2, "p2": 0.7, "p3": 0.9}
    with pytest.raises(ConfigError, match=rf"{reached} of 4 prompts reach teacher_threshold={threshold}") as caught:
        scheduler.start_round(tau, dict.fromkeys(tau, 0.0))
    assert "\n" not in str(caught.value)
