"""One update's trajectories over ranks and micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import UpdatePlan, plan_update
from tests.fakes import make_group
from video_opd.config_learner import LossConfig
from video_opd.types import ScoredGroup, TopK

groups_of_lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=9)


def build(lengths: list[list[int]], top_k: int | None = None) -> list[ScoredGroup]:
    return [
        make_group(f"p{i}", of_group, num_prompt_tokens=1 + 7 * i % 5, top_k=top_k, seed=i)
        for i, of_group in enumerate(lengths)
    ]


def plans(
    groups: list[ScoredGroup], micro_batch: int, world_size: int, loss: LossConfig | None = None
) -> list[UpdatePlan]:
    return [
        plan_update(groups, loss or LossConfig(), micro_batch, rank, world_size) for rank in range(world_size)
    ]


def rows(plan: UpdatePlan):
    return [row for micro_batch in plan.micro_batches for row in micro_batch]


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_every_trajectory_counts_exactly_once_over_all_ranks(lengths, micro_batch, world_size):
    groups = build(lengths)
    counted = [
        row.trajectory.trajectory_id
        for p in plans(groups, micro_batch, world_size)
        for row in rows(p)
        if row.weight
    ]
    assert sorted(counted) == sorted(t.trajectory_id for g in groups for t in g.group.trajectories)


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_ranks_have_equally_many_micro_batches_none_empty_and_none_too_large(
    lengths, micro_batch, world_size
):
    of_ranks = plans(build(lengths), micro_batch, world_size)
    total = sum(len(of_group) for of_group in lengths)
    assert {len(p.micro_batches) for p in of_ranks} == {-(-total // (micro_batch * world_size))}
    assert all(1 <= len(m) <= micro_batch for p in of_ranks for m in p.micro_batches)


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_filler_rows_weigh_nothing_and_stand_alone(lengths, micro_batch, world_size):
    for plan in plans(build(lengths), micro_batch, world_size):
        assert {row.weight for row in rows(plan)} <= {0.0, 1.0}
        for micro in plan.micro_batches:
            if any(row.weight == 0.0 for row in micro):
                assert len(micro) == 1 and len(micro[0].advantage) == len(
                    micro[0].trajectory.response_token_ids
                )


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_every_rank_knows_how_many_tokens_the_fullest_has(lengths, micro_batch, world_size):
    of_ranks = plans(build(lengths), micro_batch, world_size)
    counted = [[sum(len(row.advantage) for row in m) for m in p.micro_batches] for p in of_ranks]
    assert all(p.most_tokens == [max(of_all) for of_all in zip(*counted, strict=True)] for p in of_ranks)


def test_a_rank_without_a_row_repeats_one_with_weight_zero():
    first, second = plans(build([[3], [2], [4]]), micro_batch=1, world_size=2)
    assert [row.weight for row in rows(first)] == [1.0, 1.0]
    assert [row.weight for row in rows(second)] == [1.0, 0.0]


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_every_rank_divides_by_the_token_count_of_all_ranks(lengths, micro_batch, world_size):
    of_ranks = plans(build(lengths), micro_batch, world_size)
    assert {p.num_tokens for p in of_ranks} == {sum(sum(of_group) for of_group in lengths)}
    assert (
        sum(len(row.advantage) for p in of_ranks for row in rows(p) if row.weight) == of_ranks[0].num_tokens
    )


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(center="batch", clamp=1.5)])
@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_rows_carry_their_own_advantage_centred_on_the_whole_batch(loss, lengths, micro_batch, world_size):
    groups = build(lengths, top_k=3)
    pairs = [(t, s) for g in groups for t, s in zip(g.group.trajectories, g.scores, strict=True)]
    raw = {t.trajectory_id: s.teacher_logprobs.astype(np.float64) - t.actor_logprobs for t, s in pairs}
    if loss.clamp:
        raw = {k: np.clip(r, -loss.clamp, loss.clamp) for k, r in raw.items()}
    mean = np.concatenate(list(raw.values())).mean() if loss.center == "batch" else 0.0
    top_k = {t.trajectory_id: s.top_k for t, s in pairs}
    for plan in plans(groups, micro_batch, world_size, loss):
        for row in rows(plan):
            name = row.trajectory.trajectory_id
            np.testing.assert_allclose(row.advantage, raw[name] - mean, atol=1e-5)
            assert row.scores is not None and row.scores.top_k is top_k[name]
            assert row.prompt.prompt_id == row.trajectory.prompt_id


@given(lengths=groups_of_lengths, micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_micro_batches_hold_like_lengths(lengths, micro_batch, world_size):
    """Sequences of one round of micro-batches are at least as long as those of the next."""
    of_ranks = plans(build(lengths), micro_batch, world_size)
    for earlier, later in zip(
        range(len(of_ranks[0].micro_batches)), range(1, len(of_ranks[0].micro_batches)), strict=False
    ):
        longest_later = max(_length(r) for p in of_ranks for r in p.micro_batches[later] if r.weight)
        assert min(_length(r) for p in of_ranks for r in p.micro_batches[earlier]) >= longest_later


@given(lengths=groups_of_lengths, data=st.data(), world_size=st.integers(1, 3))
def test_suspended_rollouts_count_in_the_denominator_and_nowhere_else(lengths, data, world_size):
    groups = []
    for i, of_group in enumerate(lengths):
        cut = data.draw(st.integers(0, len(of_group)))
        groups.append(make_group(f"p{i}", of_group[:cut], suspended=of_group[cut:], seed=i))
    of_ranks = plans(groups, 2, world_size)
    assert {p.num_tokens for p in of_ranks} == {sum(map(sum, lengths))}
    trained = sorted(row.trajectory.trajectory_id for p in of_ranks for row in rows(p) if row.weight)
    assert trained == sorted(t.trajectory_id for g in groups for t in g.group.trajectories)
    if not trained:
        assert all(p.micro_batches == [] for p in of_ranks)


def test_scores_in_another_order_than_their_trajectories_are_refused():
    group = make_group("p", [2, 3])
    with pytest.raises(
        ValueError, match=r"prompt p: trajectories \['p/0', 'p/1'\] were scored as \['p/1', 'p/0'\]"
    ):
        ScoredGroup(group=group.group, scores=group.scores[::-1])


def test_arrays_of_other_lengths_than_the_response_are_refused_by_name():
    group = make_group("p", [2, 3], top_k=4)
    trajectory, score = group.group.trajectories[1], group.scores[1]
    with pytest.raises(ValueError, match="p/1: 3 response tokens, 2 actor log-probs"):
        replace(trajectory, actor_logprobs=trajectory.actor_logprobs[:2])
    short = replace(score, teacher_logprobs=score.teacher_logprobs[:2])
    with pytest.raises(ValueError, match="p/1: 3 response tokens, 2 teacher log-probs"):
        ScoredGroup(group=group.group, scores=(group.scores[0], short))
    assert score.top_k
    assert score.top_k is not None
    cut = replace(score, top_k=TopK(ids=score.top_k.ids[:2], logprobs=score.top_k.logprobs[:2]))
    with pytest.raises(ValueError, match="p/1"):
        ScoredGroup(group=group.group, scores=(group.scores[0], cut))


def _length(row) -> int:
    return len(row.trajectory.prompt_token_ids) + len(row.trajectory.response_token_ids)
