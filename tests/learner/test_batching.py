"""One update's trajectories over ranks and passes: those of one clip together, as far as they fit."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from math import ceil, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import Row, UpdatePlan, plan_update
from tests.fakes import make_clip, make_group
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.models.trees import trees_of
from video_opd.types import ScoredGroup, TopK

LOSS = LossConfig()
VIDEO = 99  # no token of these
of_prompts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)
clips_of_prompts = st.lists(of_prompts, min_size=1, max_size=5)  # response lengths by clip and prompt
learners = st.builds(
    lambda micro_batch, tree_tokens, world_size: LearnerConfig(
        micro_batch=micro_batch, tree_tokens=tree_tokens, world_size=world_size
    ),
    st.integers(1, 6),
    st.none() | st.integers(1, 80),
    st.integers(1, 4),
)


def of_clip(group: ScoredGroup, clip: int, prompt: int = 0) -> ScoredGroup:
    """The group of a prompt that begins as all of the clip's do, with some tokens of its own at the end."""
    ids = np.concatenate([np.arange(1 + 7 * clip % 19), np.full(1 + prompt, 100 + prompt)]).astype(np.int32)
    trajectories = tuple(replace(t, prompt_token_ids=ids) for t in group.group.trajectories)
    shown = replace(group.group.prompt, clip=make_clip(f"clip{clip}"))
    return replace(group, group=replace(group.group, prompt=shown, trajectories=trajectories))


def build(clips: list[list[list[int]]], top_k: int | None = None) -> list[ScoredGroup]:
    """The first prompt of each clip, then the second of each, as a batch may mix them."""
    placed = [(p, c, lengths) for c, clip in enumerate(clips) for p, lengths in enumerate(clip)]
    return [
        of_clip(make_group(f"c{c}p{p}", lengths, top_k=top_k, seed=7 * c + p), c, p)
        for p, c, lengths in sorted(placed)
    ]


def plans(
    groups: list[ScoredGroup],
    learner: LearnerConfig,
    loss: LossConfig | None = None,
    num_sequences: int | None = None,
) -> list[UpdatePlan]:
    ranks = range(learner.world_size)
    tokens = (lambda _: np.zeros(3, np.int32)), VIDEO
    return [plan_update(groups, loss or LOSS, learner, rank, *tokens, num_sequences) for rank in ranks]


def learner_of(micro_batch: int, world_size: int = 1, tree_tokens: int | None = None) -> LearnerConfig:
    return LearnerConfig(micro_batch=micro_batch, world_size=world_size, tree_tokens=tree_tokens)


def rows(plan: UpdatePlan):
    return [row for micro_batch in plan.micro_batches for row in micro_batch]


def clip_of(row: Row) -> str:
    return row.prompt.clip.clip_id


def packed_tokens(of_pass: list[Row]) -> int:
    """As the forward pass packs them."""
    sequences = [
        np.concatenate([r.trajectory.prompt_token_ids, r.trajectory.response_token_ids]) for r in of_pass
    ]
    trees = trees_of(sequences, [np.zeros(1)] * len(of_pass), [clip_of(row) for row in of_pass])
    return sum(tree.num_tokens for tree in trees)


def names(of_rows: list[Row]) -> list[str]:
    return [row.trajectory.trajectory_id for row in of_rows if row.weight]


@given(clips=clips_of_prompts, learner=learners)
def test_every_trajectory_counts_exactly_once_over_all_ranks(clips, learner):
    groups = build(clips)
    counted = [name for plan in plans(groups, learner) for name in names(rows(plan))]
    assert sorted(counted) == sorted(t.trajectory_id for g in groups for t in g.group.trajectories)


@given(clips=clips_of_prompts, learner=learners)
def test_ranks_have_equally_many_passes_and_each_keeps_both_bounds(clips, learner):
    of_ranks = plans(build(clips), learner)
    assert len({len(p.micro_batches) for p in of_ranks}) == 1
    for of_pass in [m for p in of_ranks for m in p.micro_batches]:
        assert 1 <= len(of_pass) <= learner.micro_batch
        assert len(of_pass) == 1 or packed_tokens(of_pass) <= (learner.tree_tokens or inf)


def fewest_parts(of_one: list[Row], learner: LearnerConfig) -> int:
    """In which neighbours of one clip fit, by trying every cut."""
    best = [0.0] + [inf] * len(of_one)
    for end in range(1, len(of_one) + 1):
        for start in range(max(0, end - learner.micro_batch), end):
            if end - start == 1 or packed_tokens(of_one[start:end]) <= (learner.tree_tokens or inf):
                best[end] = min(best[end], best[start] + 1)
    return int(best[-1])


@given(clips=clips_of_prompts, learner=learners)
def test_a_clip_is_split_only_where_it_does_not_fit_and_then_into_the_fewest_parts(clips, learner):
    groups = build(clips)
    places = defaultdict(set)
    for rank, plan in enumerate(plans(groups, learner)):
        for number, of_pass in enumerate(plan.micro_batches):
            for row in of_pass:
                if row.weight:
                    places[clip_of(row)].add((rank, number))
    separate = plans(groups, learner_of(micro_batch=64))[0].micro_batches[0]
    for clip, found in places.items():
        assert len(found) <= fewest_parts([row for row in separate if clip_of(row) == clip], learner)


def test_the_parts_of_a_clip_have_about_equally_many_rows_and_the_prompts_of_each_are_neighbours():
    groups = build([[[3, 3, 3]] * 3])
    (plan,) = plans(groups, learner_of(micro_batch=4))
    assert [names(m) for m in plan.micro_batches] == [[f"c0p{p}/{i}" for i in range(3)] for p in (2, 1, 0)]
    alone, shared = plans(groups, learner_of(8))[0].micro_batches
    assert {len(alone), len(shared)} == {4, 5}


def test_where_equal_parts_would_be_more_than_full_ones_they_are_full():
    (plan,) = plans(build([[[1], [1], [1], [60]]]), learner_of(micro_batch=4, tree_tokens=67))
    assert sorted(len(m) for m in plan.micro_batches) == [1, 3]


def test_a_pass_that_one_rank_alone_needs_takes_something_of_the_other_ranks_full_ones():
    """Four short responses fill a pass of each rank when that of two responses comes."""
    of_ranks = plans(
        build([[[60]], [[50]], [[40]], [[30]], [[1, 1]]]), learner_of(micro_batch=3, world_size=2)
    )
    sizes = [[len(m) for m in plan.micro_batches] for plan in of_ranks]
    assert sorted(sizes) == [[1, 1], [2, 2]]
    assert all(row.weight for plan in of_ranks for row in rows(plan))


@given(clips=clips_of_prompts, learner=learners)
def test_a_row_of_weight_zero_is_its_ranks_shortest_and_stands_where_nothing_else_could(clips, learner):
    for plan in plans(build(clips), learner):
        assert {row.weight for row in rows(plan)} <= {0.0, 1.0}
        own = [row for row in rows(plan) if row.weight]
        for of_pass in plan.micro_batches:
            if any(row.weight == 0.0 for row in of_pass):
                (filler,) = of_pass
                assert all(len({clip_of(row) for row in m}) == 1 for m in plan.micro_batches)
                assert len(filler.signal.advantage) == len(filler.trajectory.response_token_ids)
                assert not own or len(filler.token_ids) == min(len(row.token_ids) for row in own)


@given(clips=clips_of_prompts, learner=learners)
def test_every_rank_knows_how_many_tokens_the_fullest_has(clips, learner):
    of_ranks = plans(build(clips), learner)
    counted = [[sum(len(row.signal.advantage) for row in m) for m in p.micro_batches] for p in of_ranks]
    assert all(p.most_tokens == [max(of_all) for of_all in zip(*counted, strict=True)] for p in of_ranks)


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), learner=learners)
def test_prompts_of_different_clips_take_the_fewest_passes(lengths, learner):
    learner = learner.model_copy(update={"tree_tokens": None})
    of_ranks = plans([make_group(f"p{i}", [n]) for i, n in enumerate(lengths)], learner)
    num_passes = ceil(len(lengths) / (learner.micro_batch * learner.world_size))
    assert {len(p.micro_batches) for p in of_ranks} == {num_passes}
    fillers = sum(row.weight == 0.0 for p in of_ranks for row in rows(p))
    assert fillers == max(0, num_passes * learner.world_size - len(lengths))


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=7), world_size=st.integers(2, 3))
def test_ranks_have_about_equally_many_tokens(sizes, world_size):
    """At most 4/3 of the best division: Graham's bound for the largest first (1969)."""
    groups = [make_group(f"p{i}", [n]) for i, n in enumerate(sizes)]
    found = max(
        sum(packed_tokens([r]) for r in rows(p) if r.weight)
        for p in plans(groups, learner_of(64, world_size))
    )
    tokens = [5 + n for n in sizes]
    dealt = product(range(world_size), repeat=len(sizes))
    best = min(max(np.bincount(ranks, tokens, world_size)) for ranks in dealt)
    assert found <= 4 / 3 * best


def test_parts_of_a_clip_share_a_pass_only_if_both_fit_as_the_one_tree_that_they_become():
    """Rollouts of one prompt share its long question; beside those of another they share the video alone."""
    groups = []
    for number, lengths in enumerate([[1, 1, 1], [30], [1, 1, 1]]):
        (group,) = build([[lengths]])
        ids = np.array([*[VIDEO] * 10, *[number] * 20], np.int32)
        trajectories = tuple(replace(t, prompt_token_ids=ids) for t in group.group.trajectories)
        groups.append(replace(group, group=replace(group.group, trajectories=trajectories)))
    (plan,) = plans(groups, learner_of(8, tree_tokens=70))
    assert sorted(len(m) for m in plan.micro_batches) == [1, 3, 3]
    assert max(packed_tokens(m) for m in plan.micro_batches) <= 70


def test_a_rank_without_a_row_repeats_one_with_weight_zero():
    first, second = plans(build([[[3]], [[2]], [[4]]]), learner_of(micro_batch=1, world_size=2))
    assert [row.weight for row in rows(first)] == [1.0, 0.0] and [row.weight for row in rows(second)] == [
        1.0,
        1.0,
    ]


def test_a_rank_repeats_a_row_of_its_own_whose_clip_it_reads_anyway():
    """One clip in one pass, and two clips that need one each."""
    groups = build([[[60]], [[9]], [[9]]])
    of_ranks = plans(groups, learner_of(micro_batch=1, world_size=2))
    of_first = [(clip_of(row), row.weight) for row in rows(of_ranks[0])]
    assert of_first == [("clip0", 1.0), ("clip0", 0.0)]


def test_large_passes_come_first_and_those_of_one_clip_follow_each_other():
    (plan,) = plans(build([[[30], [3]], [[15], [12]]]), learner_of(micro_batch=1))
    assert [names([row])[0] for row in rows(plan)] == ["c0p0/0", "c0p1/0", "c1p0/0", "c1p1/0"]


def test_cuts_of_the_same_frames_at_other_times_share_no_pass_for_want_of_a_common_text():
    first, second = build([[[3], [3]]])
    shifted = replace(second.group.prompt, clip=replace(second.group.prompt.clip, start_s=1.0))
    second = replace(second, group=replace(second.group, prompt=shifted))
    found = plans([first, second], learner_of(4, world_size=2))
    assert [len(rows(plan)) for plan in found] == [1, 1]


def test_the_rollouts_of_a_question_before_its_video_share_what_those_of_another_do_not():
    """A prefix has a video whole or not at all: of two questions only the first tokens would be left."""
    groups = []
    for number in range(2):
        (group,) = build([[[2, 2]]])
        ids = np.array([1, 2, 30 + number, *[VIDEO] * 9, 4], np.int32)
        trajectories = tuple(replace(t, prompt_token_ids=ids) for t in group.group.trajectories)
        groups.append(replace(group, group=replace(group.group, trajectories=trajectories)))
    for tree_tokens, num_passes in ((2 * 13 + 4 * 2, 2), (13 + 2 * 2, 2), (13 + 2, 4)):
        (plan,) = plans(groups, learner_of(2, tree_tokens=tree_tokens))
        assert len(plan.micro_batches) == num_passes


def test_a_prompt_that_nobody_sampled_has_the_tokens_that_it_will_be_encoded_to():
    (group,) = build([[[2]]])
    written = [replace(t, prompt_token_ids=np.zeros(0, np.int32)) for t in group.group.trajectories]
    group = replace(group, group=replace(group.group, trajectories=tuple(written)))
    asked = []

    def ids_of(prompt):
        asked.append(prompt.prompt_id)
        return np.arange(30, dtype=np.int32)

    plan = plan_update([group], LOSS, learner_of(1), 0, ids_of, VIDEO)
    assert len(rows(plan)[0].token_ids) == 32 and asked == ["c0p0"]


@given(clips=clips_of_prompts, learner=learners)
def test_every_rank_divides_by_the_token_count_of_all_ranks(clips, learner):
    of_ranks = plans(build(clips), learner)
    assert {p.denominator for p in of_ranks} == {sum(sum(map(sum, clip)) for clip in clips)}
    counted = sum(len(row.signal.advantage) for p in of_ranks for row in rows(p) if row.weight)
    assert counted == of_ranks[0].denominator


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 14), ("sequence", 4), ("sum", 1)])
def test_a_loss_is_divided_by_tokens_or_responses_suspended_ones_included(reduction, expected):
    groups = [make_group("a", [2, 3], suspended=[4]), make_group("b", [5])]
    of_ranks = plans(groups, learner_of(2, 2), LossConfig(reduction=reduction))
    assert [p.denominator for p in of_ranks] == [expected] * 2


@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 32 * 3.5), ("sequence", 32), ("sum", 1)])
def test_a_preset_number_of_sequences_divides_whatever_was_presented_and_retained(reduction, expected, kept):
    """n_t = 32 with 4 responses of 2, 3, 4 and 5 tokens, 3.5 in the mean (arXiv 2609.40055, eq. 8)."""
    lengths = [2, 3, 4, 5]
    groups = [make_group(f"p{n}", [n]) for n in lengths[:kept]]
    groups += [make_group(f"p{n}", [], suspended=[n]) for n in lengths[kept:]]
    of_ranks = plans(groups, learner_of(2, 5), LossConfig(reduction=reduction), num_sequences=32)
    assert [p.denominator for p in of_ranks] == [expected] * 5
    trained = [row for plan in of_ranks for row in rows(plan) if row.weight]
    assert sorted(len(row.signal.advantage) for row in trained) == lengths[:kept]
    if kept:
        assert all(rows(plan) for plan in of_ranks), "a rank without a sequence keeps step"


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(center="batch", clamp=1.5)])
@given(clips=clips_of_prompts, learner=learners)
def test_rows_carry_their_own_advantage_centred_on_the_whole_batch(loss, clips, learner):
    groups = build(clips, top_k=3)
    pairs = [(t, s) for g in groups for t, s in zip(g.group.trajectories, g.scores, strict=True)]
    raw = {t.trajectory_id: s.teacher_logprobs.astype(np.float64) - t.actor_logprobs for t, s in pairs}
    if loss.clamp:
        raw = {k: np.clip(r, -loss.clamp, loss.clamp) for k, r in raw.items()}
    mean = np.concatenate(list(raw.values())).mean() if loss.center == "batch" else 0.0
    top_k = {t.trajectory_id: s.top_k for t, s in pairs}
    for plan in plans(groups, learner, loss):
        for row in rows(plan):
            name = row.trajectory.trajectory_id
            np.testing.assert_allclose(row.signal.advantage, raw[name] - mean, atol=1e-5)
            assert row.scores is not None and row.scores.top_k is top_k[name]
            assert row.prompt.prompt_id == row.trajectory.prompt_id


@given(lengths=of_prompts, data=st.data(), world_size=st.integers(1, 3))
def test_suspended_rollouts_count_in_the_denominator_and_nowhere_else(lengths, data, world_size):
    groups = []
    for i, of_group in enumerate(lengths):
        cut = data.draw(st.integers(0, len(of_group)))
        groups.append(make_group(f"p{i}", of_group[:cut], suspended=of_group[cut:], seed=i))
    of_ranks = plans(groups, learner_of(2, world_size))
    assert {p.denominator for p in of_ranks} == {sum(map(sum, lengths))}
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
