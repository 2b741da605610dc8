"""The scheduler without Ray: shuffled passes, prompts in flight, resuming, and TVDF selection."""

import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.scheduler import Scheduler, observation
from curriculum.state import check_state
from curriculum.tvdf import SAMPLERS
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_curriculum import CurriculumConfig
from video_opd.config_file import load_demo
from video_opd.errors import CheckpointError, ConfigError, RunError
from video_opd.grounding import ROUNDING
from video_opd.types import FailedPrompt, Prompt

KINDS = ("uniform", "tvdf", "scc", "difficulty")


demo = cache(load_demo)


def make_config(seed: int = 0, groups_per_step: int = 1, **options) -> Config:
    """The demo's, with the curriculum that the test names."""
    config = demo(("num_steps=1000", "max_policy_lag=0", "groups_per_step=1"))
    update = {"seed": seed, "groups_per_step": groups_per_step, "curriculum": CurriculumConfig(**options)}
    return config.model_copy(update=update)


def make_scheduler(num_prompts: int, seed: int = 0, groups_per_step: int = 1, **options) -> Scheduler:
    return Scheduler(
        [make_prompt(f"p{i}") for i in range(num_prompts)], make_config(seed, groups_per_step, **options)
    )


def start_round(
    scheduler: Scheduler, teacher_iou: Sequence[float], student_iou: Sequence[float], step: int = 0
) -> int | None:
    scheduler.validate(np.array(teacher_iou))
    return scheduler.start_round(np.array(student_iou), step)


def records_of(scheduler: Scheduler) -> list[dict]:
    return scheduler.records().to_pylist()


def issue(scheduler: Scheduler, n: int) -> list[str]:
    return [p.prompt_id for p in scheduler.next_prompts(n)]


def train(scheduler: Scheduler, prompt_ids: Sequence[str], step: int = 0, rollouts: int = 1) -> None:
    scheduler.observe([observation(make_group(p, [3] * rollouts)) for p in prompt_ids], step)


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
    assert {r["prompt_id"] for r in records_of(scheduler) if r["dropped"]} == retired


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
    assert {r["prompt_id"]: r["dropped"] for r in records_of(scheduler) if r["dropped"]} == {
        first[0]: "video x cannot be decoded"
    }
    assert scheduler.metrics()["curriculum/dropped"] == 1


def test_too_few_prompts_left_ends_the_run_in_one_line():
    scheduler = make_scheduler(4)
    issued = issue(scheduler, 3)
    scheduler.retire([FailedPrompt(prompt_id=issued[0], reason="broken")])
    with pytest.raises(
        RunError, match=r"0 prompts that are not in flight, 1 more .* \(1 of 4 were dropped\)"
    ) as caught:
        issue(scheduler, 2)
    assert "\n" not in str(caught.value)


def test_records_count_rollouts_and_the_last_step_in_the_order_of_the_pool():
    scheduler = make_scheduler(3)
    train(scheduler, issue(scheduler, 3), step=4, rollouts=2)
    second = issue(scheduler, 1)
    train(scheduler, second, step=5, rollouts=3)
    records = records_of(scheduler)
    assert [r["prompt_id"] for r in records] == ["p0", "p1", "p2"]
    assert {r["prompt_id"]: (r["num_rollouts"], r["last_step"]) for r in records} == {
        p: (5, 5) if p in second else (2, 4) for p in ("p0", "p1", "p2")
    }
    assert [(r["teacher_iou"], r["student_iou"], r["selected"], r["dropped"]) for r in records] == [
        (None, [], True, "")
    ] * 3


def test_seen_share_is_over_the_selected_prompts():
    scheduler = make_scheduler(4)
    assert scheduler.metrics()["curriculum/seen_frac"] == 0.0
    train(scheduler, issue(scheduler, 3))
    assert scheduler.metrics()["curriculum/seen_frac"] == 0.75


def restored(state: dict, num_prompts: int, groups_per_step: int = 1, **options) -> Scheduler:
    """A fresh scheduler of another seed that loads the state from disk, as from a checkpoint."""
    rest = json.loads(json.dumps({k: v for k, v in state.items() if k != "records"}))
    file = io.BytesIO()
    pq.write_table(state["records"], file)
    scheduler = make_scheduler(num_prompts, seed=999, groups_per_step=groups_per_step, **options)
    scheduler.load_state_dict(rest | {"records": pq.read_table(file)})
    scheduler.reissue()
    return scheduler


def run_rounds(scheduler: Scheduler, first: int, last: int, sigma_seed: int) -> list[list[str]]:
    """Steps `first` to `last` as the loop does them: select when due, sample, train; sigma varies by step."""
    steps = []
    for step in range(first, last):
        if step == scheduler.next_selection():
            if step == 0:  # 4 of the 24 are below 0.5
                tau = np.random.default_rng(sigma_seed).permutation(np.linspace(0.4, 1, 24))
                scheduler.validate(tau)
            sigma = np.random.default_rng([sigma_seed, step]).permutation(np.linspace(0, 1, 24))
            scheduler.start_round(sigma, step)
        steps.append(issue(scheduler, *scheduler.step_sizes(step, step + 1)))
        train(scheduler, steps[-1], step)
    return steps


@given(
    kind=st.sampled_from(KINDS),
    sampler=st.sampled_from(["top_k", "dsus", "bbds", "gwds", "uniform"]),
    stop=st.integers(1, 11),
    by_video=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_run_stopped_anywhere_and_restored_samples_what_one_that_was_never_stopped_does(
    kind, sampler, stop, by_video, seed
):
    """Across and within rounds, with every sampler: same prompts, order, records and random state."""
    options = {
        "kind": kind,
        "sampler": sampler,
        "teacher_threshold": 0.5,
        "group_by_video": by_video,
        "scc": {"anchor_frac": 0.5, "schedule": False},
    }
    if kind != "uniform":
        options["num_selected"] = 4 if kind == "scc" else 9
    scheduler = make_scheduler(24, seed, groups_per_step=2, **options)
    run_rounds(scheduler, 0, stop, seed)
    copy = restored(scheduler.state_dict(), 24, groups_per_step=2, **options)
    assert copy.records() == scheduler.records()
    assert run_rounds(copy, stop, 12, seed) == run_rounds(scheduler, stop, 12, seed)
    assert copy.state_dict() == scheduler.state_dict()


def test_retired_and_selected_prompts_are_restored():
    scheduler = make_scheduler(6, kind="tvdf", num_selected=4)
    start_round(scheduler, [0.9] * 6, [0.1 * i for i in range(6)])
    scheduler.retire([FailedPrompt(prompt_id="p1", reason="broken")])
    copy = restored(scheduler.state_dict(), 6, kind="tvdf", num_selected=4)
    assert copy.records() == scheduler.records()
    assert sorted(issue_and_train(copy, 1, 4)) == ["p0", "p2", "p3", "p4"], "p4 took the place of p1"


def with_failed(num_prompts: int, *places: int, **options) -> Scheduler:
    """A scheduler of a pool in which the prompts at some places cannot be used."""
    pool: list[Prompt | FailedPrompt] = [make_prompt(f"p{i}") for i in range(num_prompts)]
    for place in places:
        pool[place] = FailedPrompt(prompt_id=f"p{place}", reason=f"video {place} is missing")
    return Scheduler(pool, make_config(seed=999, **options))


def test_what_cannot_be_used_has_its_place_and_reason_and_is_never_issued():
    scheduler = with_failed(6, 1, 4)
    assert [r["dropped"] for r in records_of(scheduler)] == [
        "",
        "video 1 is missing",
        "",
        "",
        "video 4 is missing",
        "",
    ]
    assert scheduler.to_ask(0).tolist() == [0, 2, 3, 5]
    assert sorted(issue_and_train(scheduler, 2, 4)) == sorted(["p0", "p2", "p3", "p5"] * 2)


@pytest.mark.parametrize("kind", ["uniform", "tvdf"])
def test_a_resume_drops_what_cannot_be_used_now_and_keeps_what_was_dropped_before(kind):
    options = {"kind": kind} | ({"num_selected": 4} if kind == "tvdf" else {})
    before = make_scheduler(8, **options)
    if kind == "tvdf":
        start_round(before, [0.9] * 8, [0.1 * i for i in range(8)])  # selects p0 to p3
    before.retire([FailedPrompt(prompt_id="p2", reason="broke at step 3")])
    in_flight = issue(before, 2)
    state = before.state_dict()
    after = with_failed(8, 0, 2, **options)
    after.load_state_dict(state)
    after.reissue()
    reasons = {r["prompt_id"]: r["dropped"] for r in records_of(after) if r["dropped"]}
    assert reasons == {"p0": "video 0 is missing", "p2": "broke at step 3"}
    issued = issue_and_train(after, 1, 12)
    lost = [name for name in in_flight if name != "p0"]
    assert issued[: len(lost)] == lost, "in flight at the checkpoint"
    # in a round p4 took the place of p2, p5 takes that of p0
    left = {"p1", "p3", "p4", "p5"} | ({"p6", "p7"} if kind == "uniform" else set())
    assert set(issued) == left
    check_state(state, [f"p{i}" for i in range(8)], make_config(**options))


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


@given(
    saved=st.integers(0, 20),
    lost=st.integers(0, 20),
    kind=st.sampled_from(["uniform", "tvdf"]),
    seed=st.integers(0, 1000),
)
def test_a_saved_state_and_what_was_asked_since_give_the_lost_scheduler_again(saved, lost, kind, seed):
    """As Curriculum does when its actor dies: in flight stays in flight, later draws are the same."""
    rng = random.Random(seed)
    options = {} if kind == "uniform" else {"kind": kind, "num_selected": 9, "teacher_threshold": 0}
    scheduler = make_scheduler(16, seed, **options)
    if kind == "tvdf":
        start_round(scheduler, [0.9] * 16, [rng.random() for _ in range(16)])
    waiting: list[str] = []

    def change() -> tuple:
        if waiting and rng.random() < 0.3:
            done = waiting.pop(rng.randrange(len(waiting)))
            return ("observe", [observation(make_group(done, [2]))], 0)
        if waiting and rng.random() < 0.1:
            return ("retire", [FailedPrompt(prompt_id=waiting.pop(), reason="broken")])
        if len(waiting) > 3:
            return ("observe", [observation(make_group(waiting.pop(0), [2]))], 0)
        return ("next_prompts", 1)

    def tell(told: Scheduler, method: str, *arguments) -> object:
        answer = getattr(told, method)(*arguments)
        return [p.prompt_id for p in answer] if method == "next_prompts" else answer

    def go_on(times: int) -> list[tuple]:
        changes = []
        for _ in range(times):
            changes.append(change())
            answer = tell(scheduler, *changes[-1])
            waiting.extend(answer if isinstance(answer, list) else [])
        return changes

    go_on(saved)
    state = scheduler.state_dict()
    changes = go_on(lost)
    copy = make_scheduler(16, seed=999, **options)
    copy.load_state_dict(state)
    for since in changes:
        tell(copy, *since)
    assert copy.state_dict() == scheduler.state_dict()
    assert issue(copy, 2) == issue(scheduler, 2)


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


def test_the_next_selection_is_at_step_0_then_where_a_round_ends_or_never():
    selections = {}
    for kind in KINDS:
        scheduler = make_scheduler(
            8,
            kind=kind,
            num_selected=4 if kind != "uniform" else None,
            scc={"anchor_frac": 0.5, "schedule": False},
        )
        selections[kind] = [scheduler.next_selection()]
        scheduler.retire(
            [FailedPrompt(prompt_id="p7", reason="broken")]
        )  # in no round: nothing takes its place
        if kind != "uniform":
            selections[kind].append(start_round(scheduler, [0.9] * 8, [0.9, 0.1] * 4, step=3))
            in_round = [r["prompt_id"] for r in records_of(scheduler) if r["selected"]]
            scheduler.retire([FailedPrompt(prompt_id=in_round[0], reason="broken")])
            left = [r["prompt_id"] for r in records_of(scheduler) if r["selected"] and not r["dropped"]]
            assert len(left) == (4 if kind == "tvdf" else 3), kind
    assert selections == {"uniform": [None], "tvdf": [0, 7], "scc": [0, None], "difficulty": [0, None]}


def test_a_checkpoint_of_other_prompts_is_refused_with_their_names():
    with pytest.raises(CheckpointError, match=r"has 3 prompts, the data 4; 1 are in one of them only \(p3\)"):
        restored(make_scheduler(3).state_dict(), 4)


def test_a_checkpoint_of_another_curriculum_is_refused():
    state = make_scheduler(6, kind="tvdf", num_selected=2, dbtp=False).state_dict()
    for kind in KINDS:
        with pytest.raises(CheckpointError, match="resume with the curriculum the run was started with"):
            restored(state, 6, kind=kind, num_selected=2)
    restored(state, 6, kind="tvdf", dbtp=False, num_selected=3)


# --- rounds ---


@pytest.mark.parametrize(("passes", "sizes"), [(1, [32] * 78 + [4]), (2, [32] * 156 + [8])])
def test_the_last_step_of_a_round_has_what_is_left_of_its_prompts(passes, sizes):
    """2,500 prompts in steps of 32, as in the paper: 79 steps."""
    options = {"kind": "tvdf", "num_selected": 2500, "passes_per_round": passes, "trpv": False, "dbtp": False}
    scheduler = make_scheduler(2600, groups_per_step=32, **options)
    assert scheduler.start_round(None, 7) == scheduler.next_selection() == 7 + len(sizes)
    assert scheduler.step_sizes(7, 7 + len(sizes)) == sizes
    assert scheduler.step_sizes(5 + len(sizes), 7 + len(sizes)) == sizes[-2:]
    earlier = scheduler.state_dict()
    del earlier["sizes"]  # as earlier versions wrote it: all steps of the round are whole
    (copy := make_scheduler(2600, groups_per_step=32, **options)).load_state_dict(earlier)
    assert copy.step_sizes(9, 11) == [32, 32]
    counts = Counter(name for size in sizes for name in issue_and_train(scheduler, size, 1))
    assert len(counts) == 2500 and set(counts.values()) == {passes}


ious = st.floats(0, 1)


@given(
    data=st.data(),
    scores=st.lists(st.tuples(ious, ious), min_size=1, max_size=15),
    threshold=st.floats(0, 0.9),
)
def test_tvdf_selects_the_largest_disagreements_among_prompts_the_teacher_gets_right(data, scores, threshold):
    reliable = [i for i, (tau, _) in enumerate(scores) if tau >= threshold - ROUNDING]
    if not reliable:
        reliable, scores = [0], [(0.95, 0.0), *scores[1:]]
    k = data.draw(st.integers(1, len(reliable)))
    by_disagreement = sorted(reliable, key=lambda i: (scores[i][1] - scores[i][0], i))
    expected = {f"p{i}" for i in by_disagreement[:k]}

    scheduler = make_scheduler(len(scores), kind="tvdf", num_selected=k, teacher_threshold=threshold)
    assert start_round(scheduler, *zip(*scores, strict=True), step=7) == 7 + k
    assert set(issue_and_train(scheduler, 1, k)) == expected
    for i, record in enumerate(records_of(scheduler)):
        assert (record["teacher_iou"], record["student_iou"]) == (scores[i][0], [scores[i][1]])
        assert record["disagreement"] == scores[i][0] - scores[i][1]
        assert record["selected"] == (f"p{i}" in expected)
        assert bool(record["dropped"]) == (i not in reliable)


TAU, SIGMA = [0.9, 0.7, 0.69, 1.0, 0.8], [0.8, 0.1, 0.0, 0.9, 0.5]  # disagreements 0.1, 0.6, 0.69, 0.1, 0.3


@pytest.mark.parametrize(
    ("options", "selected", "dropped"),
    [
        ({}, ["p1", "p4"], ["p2"]),
        ({"trpv": False}, ["p1", "p2"], []),
        ({"sampler": "dsus"}, ["p1", "p3"], ["p2"]),  # of p1 p4 p0 p3: both ends
    ],
    ids=["both", "without trpv", "dsus"],
)
def test_tvdf_by_hand(options, selected, dropped):
    scheduler = make_scheduler(5, kind="tvdf", num_selected=2, teacher_threshold=0.7, **options)
    start_round(scheduler, TAU, SIGMA)
    assert {r["prompt_id"] for r in records_of(scheduler) if r["selected"]} == set(selected)
    assert {r["prompt_id"]: r["dropped"] for r in records_of(scheduler) if r["dropped"]} == dict.fromkeys(
        dropped, "teacher IoU is below 0.7"
    )


def test_without_dbtp_the_round_is_drawn_at_random_from_the_reliable_prompts():
    drawn = Counter()
    for seed in range(300):
        scheduler = make_scheduler(5, seed, kind="tvdf", num_selected=2, teacher_threshold=0.7, dbtp=False)
        scheduler.validate(np.array(TAU))
        scheduler.start_round(None, 0)
        drawn.update(r["prompt_id"] for r in records_of(scheduler) if r["selected"])
    assert drawn.keys() == {"p0", "p1", "p3", "p4"}
    assert all(abs(count - 150) < 45 for count in drawn.values()), drawn  # sd 8.7


def test_with_neither_trpv_nor_dbtp_no_model_is_asked():
    scheduler = make_scheduler(6, kind="tvdf", num_selected=4, trpv=False, dbtp=False)
    assert scheduler.start_round(None, 0) == 4
    assert len(set(issue_and_train(scheduler, 2, 2))) == 4


def test_tvdf_without_a_number_selects_all_that_are_reliable():
    scheduler = make_scheduler(4, kind="tvdf", teacher_threshold=0.5)
    assert start_round(scheduler, [0.5, 0.4, 1.0, 0.9], [0.0] * 4) == 3
    assert sorted(issue_and_train(scheduler, 3, 1)) == ["p0", "p2", "p3"]


def test_a_prompt_without_a_prediction_is_dropped():
    scheduler = make_scheduler(3, kind="tvdf")
    assert start_round(scheduler, [0.9, 0.9, np.nan], [0.1, np.nan, 0.1]) == 1
    assert [r["dropped"] for r in records_of(scheduler)] == ["", *["no answer: its clip cannot be read"] * 2]
    assert [r["teacher_iou"] for r in records_of(scheduler)] == [0.9, 0.9, None]


def sampled_round(scheduler: Scheduler, step: int, tau: np.ndarray, sigma: np.ndarray) -> set[int]:
    """A round as driver/rounds.py makes it; returns the places that were asked."""
    asked = scheduler.to_ask(step)
    if len(lacking := scheduler.not_validated(step)):
        known = np.full(len(tau), np.nan)
        known[lacking] = tau[lacking]
        scheduler.validate(known, lacking)
    of_student = np.full(len(sigma), np.nan)
    left = scheduler.to_ask(step)
    of_student[left] = sigma[left]
    scheduler.start_round(of_student, step, left)
    return set(asked.tolist())


@pytest.mark.parametrize("sampler", ["top_k", "gwds", "uniform"])
def test_prompts_that_a_round_did_not_ask_stay_for_later_ones_and_are_not_selected(sampler):
    rng = np.random.default_rng(0)
    scheduler = make_scheduler(60, kind="tvdf", num_selected=8, pool_sample=20, sampler=sampler)
    tau, validated, of_rounds = rng.uniform(0.4, 1.0, 60), set[int](), []
    for step in range(6):
        lacking = set(scheduler.not_validated(step).tolist())
        assert not lacking & validated, "a teacher's answer is asked for once"
        of_rounds.append(asked := sampled_round(scheduler, step, tau, rng.uniform(0, 1, 60)))
        validated |= lacking
        records = records_of(scheduler)
        selected = {i for i, r in enumerate(records) if r["selected"]}
        assert len(asked) == 20 and len(selected) == 8 and selected <= asked & validated
        dropped = {i for i, r in enumerate(records) if r["dropped"]}
        assert dropped == {i for i in validated if tau[i] < 0.7}, "what was not asked is not dropped"
    assert len(set(map(frozenset, of_rounds))) == 6 and len(validated) > 40


def test_a_prompt_that_fails_is_not_replaced_by_one_that_was_not_asked():
    scheduler = make_scheduler(30, kind="tvdf", num_selected=4, pool_sample=6, teacher_threshold=0.5)
    asked = sampled_round(scheduler, 0, np.ones(30), np.linspace(0, 1, 30))
    for _ in range(3):
        selected = [r["prompt_id"] for r in records_of(scheduler) if r["selected"] and not r["dropped"]]
        scheduler.retire([FailedPrompt(prompt_id=selected[0], reason="broken")])
    left = {int(r["prompt_id"][1:]) for r in records_of(scheduler) if r["selected"] and not r["dropped"]}
    assert len(left) == 3 and left < asked, "6 were asked, 3 of them broke"


def test_a_sample_is_drawn_once_a_round_and_again_alike_after_an_interruption():
    def make() -> Scheduler:
        return make_scheduler(40, kind="tvdf", num_selected=4, pool_sample=10)

    scheduler, tau = make(), np.where(np.arange(40) % 2, 1.0, 0.0)
    first = scheduler.to_ask(0)
    scheduler.validate(tau, first)
    assert scheduler.to_ask(0).tolist() == [i for i in first if i % 2], (
        "nobody takes the places of the dropped"
    )
    state = scheduler.state_dict()
    assert make().to_ask(0).tolist() == first.tolist() != make().to_ask(1).tolist()
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(state | {"records": None})) | {"records": state["records"]})
    assert resumed.to_ask(0).tolist() == scheduler.to_ask(0).tolist(), "also from a state in mid-round"
    resumed.load_state_dict({k: v for k, v in state.items() if k != "asked"})  # of an earlier version
    assert len(resumed.to_ask(0)) == 10
    whole = make_scheduler(40, kind="tvdf", num_selected=4)
    assert whole.to_ask(0).tolist() == list(range(40))


def test_an_unreadable_clip_is_dropped_if_it_was_asked():
    scheduler = make_scheduler(12, kind="tvdf", pool_sample=4)
    tau, sigma = np.full(12, 0.9), np.full(12, 0.1)
    no_tau, no_sigma, *_ = scheduler.to_ask(0)
    tau[no_tau], sigma[no_sigma] = np.nan, np.nan
    sampled_round(scheduler, 0, tau, sigma)
    dropped = {i for i, r in enumerate(records_of(scheduler)) if r["dropped"]}
    assert dropped == {no_tau, no_sigma}


def test_too_small_a_sample_is_named():
    scheduler = make_scheduler(20, kind="tvdf", num_selected=5, pool_sample=5)
    with pytest.raises(ConfigError, match=r"below 0.7 .*; raise pool_sample=5, lower"):
        sampled_round(scheduler, 0, np.zeros(20), np.zeros(20))


def test_rounds_are_as_long_as_their_passes_and_sample_nothing_twice_unless_asked():
    for passes in (1, 3):
        scheduler = make_scheduler(
            12, groups_per_step=2, kind="tvdf", num_selected=6, passes_per_round=passes
        )
        scheduler.validate(np.full(12, 0.9))
        for _ in range(3):
            start = scheduler.next_selection()
            assert start is not None
            sigma = np.random.default_rng(start).uniform(0, 1, 12)
            assert scheduler.start_round(sigma, start) == start + 3 * passes
            counts = Counter(issue_and_train(scheduler, 2, 3 * passes))
            assert set(counts.values()) == {passes} and len(counts) == 6


def test_a_prompt_that_fails_in_a_round_leaves_its_place_to_the_next_by_disagreement():
    scheduler = make_scheduler(8, groups_per_step=4, kind="tvdf", num_selected=4)
    start_round(scheduler, [1.0] * 8, [0.1 * i for i in range(8)])
    in_flight = issue(scheduler, 4)
    assert set(in_flight) == {"p0", "p1", "p2", "p3"}
    scheduler.retire(
        [FailedPrompt(prompt_id="p1", reason="broken"), FailedPrompt(prompt_id="p6", reason="broken too")]
    )
    assert issue(scheduler, 1) == ["p4"], "p6 was not selected, so nothing takes its place"
    assert {r["prompt_id"] for r in records_of(scheduler) if r["selected"] and not r["dropped"]} == {
        "p0",
        "p2",
        "p3",
        "p4",
    }
    train(scheduler, ["p0", "p2", "p3", "p4"])
    scheduler.retire([FailedPrompt(prompt_id=f"p{i}", reason="broken") for i in (0, 2)])
    scheduler.start_round(np.array([np.nan, np.nan, np.nan, 0.0, 0.1, 0.2, np.nan, 0.3]), 1)
    assert sorted(issue(scheduler, 4)) == ["p3", "p4", "p5", "p7"], (
        "fewer than num_selected would be left: all of them"
    )


def test_a_prompt_that_the_learner_cannot_read_is_retired_before_its_step_is_observed():
    """Else it could be issued again in between, and then be observed when it is not in flight."""
    scheduler = make_scheduler(3)
    issued = issue(scheduler, 2)
    scheduler.retire([FailedPrompt(prompt_id=issued[0], reason="broken")])
    scheduler.observe([(name, 1, False) for name in issued], 0)
    records = {r["prompt_id"]: (r["dropped"], r["num_rollouts"]) for r in records_of(scheduler)}
    assert records[issued[0]] == ("broken", 1) and records[issued[1]] == ("", 1)
    assert issued[0] not in issue_and_train(scheduler, 2, 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prompt_that_fails_when_all_others_are_selected_leaves_its_place_empty(sampler):
    scheduler = make_scheduler(4, kind="tvdf", sampler=sampler)
    start_round(scheduler, [0.9] * 4, [0.1, 0.2, 0.3, 0.4])
    scheduler.retire([FailedPrompt(prompt_id="p1", reason="broken")])
    assert sorted(issue_and_train(scheduler, 1, 3)) == ["p0", "p2", "p3"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_is_selected_from_equal_disagreements_and_from_fewer_prompts_than_asked_for(sampler):
    scheduler = make_scheduler(6, kind="tvdf", sampler=sampler, num_selected=5)
    assert start_round(scheduler, [0.9] * 6, [0.4] * 6) == 5
    scheduler.retire([FailedPrompt(prompt_id=f"p{i}", reason="broken") for i in range(4)])
    assert scheduler.start_round(np.array([np.nan] * 4 + [0.4] * 2), 5) == 7
    assert sorted(issue_and_train(scheduler, 1, 2)) == ["p4", "p5"]


def test_a_later_round_without_a_prompt_left_is_an_error_that_names_a_few_of_thousands_of_reasons():
    scheduler = make_scheduler(2000, kind="tvdf")
    tau = [0.1] * 9 + [0.9] * 1991
    start_round(scheduler, tau, [0.0] * 2000)
    failed = [FailedPrompt(prompt_id=f"p{i}", reason=f"video v{i}.mp4 is cut off") for i in range(9, 2000)]
    scheduler.retire(failed)
    assert scheduler.metrics()["curriculum/seen_frac"] == 0.0
    with pytest.raises(ConfigError) as caught:
        scheduler.start_round(np.full(2000, np.nan), 4)
    said = str(caught.value)
    assert "0 of 2000 prompts are left" in said
    assert "9 dropped, teacher IoU is below 0.7 (p0, p1, p2, ...)" in said
    assert "1 dropped, video v9.mp4 is cut off (p9); 1 dropped, video v10.mp4" in said
    assert "1989 dropped for 1989 other reasons (all are in curriculum/round-2.parquet)" in said
    assert len(said) < 500 and "\n" not in said


def test_every_round_keeps_what_the_student_could_do_then():
    scheduler = make_scheduler(3, kind="tvdf", num_selected=1)
    scheduler.validate(np.array([0.9, 0.9, 0.9]))
    chosen = []
    for step, sigma in enumerate(([0.0, 0.5, 0.9], [0.9, 0.5, 0.9])):
        assert scheduler.next_selection() == step
        scheduler.start_round(np.array(sigma), step)
        chosen += issue_and_train(scheduler, 1, 1)
    assert chosen == ["p0", "p1"]
    assert [r["student_iou"] for r in records_of(scheduler)] == [[0.0, 0.9], [0.5, 0.5], [0.9, 0.9]]
    assert scheduler.metrics()["curriculum/round"] == 2


def test_scc_keeps_anchors_and_frontier_for_the_whole_run_and_marks_what_is_suspended():
    scheduler = make_scheduler(40, kind="scc", scc={"schedule": False})
    sigma = (
        [0.9] * 5 + [0.5] * 10 + [0.1] * 25
    )  # 25 Frontier at a share of 0.9: 27 prompts, 3 of them Anchors
    assert start_round(scheduler, [1.0] * 40, sigma) is None
    selected = [i for i, r in enumerate(records_of(scheduler)) if r["selected"]]
    assert sum(i < 5 for i in selected) == 3 and sum(i >= 15 for i in selected) == 24
    assert not any(5 <= i < 15 for i in selected)
    first = issue(scheduler, 2)
    groups = [make_group(first[0], [], suspended=[3]), make_group(first[1], [2])]
    scheduler.observe([observation(g) for g in groups], step=0)
    by_id = {r["prompt_id"]: r for r in records_of(scheduler)}
    assert by_id[first[0]]["suspended"] and not by_id[first[1]]["suspended"]
    assert by_id[first[0]]["num_rollouts"] == 1
    counts = Counter(issue_and_train(scheduler, 1, 25 + 27))
    assert counts[first[0]] == 1, "a suspended prompt is sampled again in the next pass"
    assert not any(r["suspended"] for r in records_of(scheduler)), (
        "and active again when it was not suspended then"
    )


def test_whole_videos_are_selected_by_the_mean_of_their_usable_prompts():
    """p0 is dropped, so v0 = {p0, p3, p6} has the largest mean. A video takes the place of what is lost."""
    prompts = [make_prompt(f"p{i}", clip_id=f"v{i % 3}") for i in range(9)]
    scheduler = Scheduler(prompts, make_config(kind="tvdf", select_by="video", num_selected=4))
    tau = [0.1] + [0.9] * 8
    start_round(scheduler, tau, [0.9, 0.1, 0.3, 0.05, 0.1, 0.4, 0.05, 0.1, 0.2])

    def selected() -> set[str]:
        return {r["prompt_id"] for r in records_of(scheduler) if r["selected"] and not r["dropped"]}

    assert selected() == {"p3", "p6", "p1", "p4"}, "v1 is cut"
    for lost, found in (("p3", "p7"), ("p6", "p8"), ("p7", "p2")):
        scheduler.retire([FailedPrompt(prompt_id=lost, reason="broken")])
        assert found in selected() and len(selected()) == 4


def test_prompts_of_one_video_are_issued_next_to_each_other_when_asked():
    prompts = [make_prompt(f"v{i % 5}:{i}", clip_id=f"v{i % 5}") for i in range(20)]
    orders = []
    for by_video in (True, False):
        scheduler = Scheduler(prompts, make_config(group_by_video=by_video))
        videos = [p.clip.clip_id for p in scheduler.next_prompts(20)]
        orders.append(sum(a != b for a, b in itertools.pairwise(videos)))
    assert orders[0] == 4 < orders[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher_threshold": 0.95},
            r"0 of 4 prompts are left, 1 are to be selected: 4 dropped, teacher IoU is below 0.95 "
            r"\(p0, p1, p2, ...\)",
        ),
        ({"teacher_threshold": 0.95, "num_selected": 2}, r"0 of 4 prompts are left, 2 are to be selected"),
        (
            {"teacher_threshold": 0.5, "num_selected": 4},
            r"3 of 4 prompts are left, 4 are to be selected: 1 dropped, .* \(p1\)",
        ),
        (
            {"teacher_threshold": 0.8, "groups_per_step": 2},
            r"1 of 4 prompts are selected, fewer than the .* = 2 in flight",
        ),
        (
            {"teacher_threshold": 0.1, "kind": "scc", "scc": {"schedule": False}},
            r"0 Anchors .* and 4 Frontier .* cannot give 1 prompts .* none was dropped",
        ),
    ],
    ids=[
        "all dropped",
        "all dropped, a number asked for",
        "fewer than asked for",
        "fewer than in flight",
        "no anchors",
    ],
)
def test_too_few_prompts_to_select_is_an_error_of_the_config_that_says_how_many_and_which(options, message):
    scheduler = make_scheduler(4, **{"kind": "tvdf"} | options)
    with pytest.raises(ConfigError, match=message) as caught:
        start_round(scheduler, [0.6, 0.2, 0.7, 0.9], [0.0] * 4)
    assert "\n" not in str(caught.value)


def test_a_threshold_that_dropped_nothing_is_not_what_to_change():
    scheduler = make_scheduler(2, kind="difficulty", num_selected=2)
    with pytest.raises(ConfigError, match=r"0 of 2 prompts are left, .*; lower num_selected or groups_per_"):
        scheduler.start_round(np.full(2, np.nan), 0)
