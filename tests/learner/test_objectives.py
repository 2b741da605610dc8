"""Every objective's value and gradient against a float64 reading of its formula, and its inputs."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from learner.batching import plan_update
from learner.loss import ResponseTokens, divergence, group_advantages, grpo_loss, loss_per_token
from learner.signals import signals_of
from tests.fakes import make_group, make_prompt
from video_opd.config_learner import OBJECTIVES, LearnerConfig, LossConfig, LossKind
from video_opd.errors import ConfigError
from video_opd.rewards import (
    answer_format,
    iou,
    load_rewards,
    merged_iou,
    parse_penalty,
    temporal_wasserstein,
    time_r1,
    total_reward,
)
from video_opd.types import ScoredGroup

R, V = 4, 6
ALL = slice(None)
NONE = np.zeros(0, np.int32)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits (a leaf), teacher logits, targets."""
    torch.manual_seed(seed)
    logits = (1.5 * torch.randn(R, V, dtype=torch.float64)).requires_grad_()
    return logits, 1.5 * torch.randn(R, V, dtype=torch.float64), torch.randint(V, (R,))


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def full_loss(logits: torch.Tensor, teacher: torch.Tensor, how: str, beta: float = 0.5) -> torch.Tensor:
    return divergence(logits.log_softmax(-1), teacher.log_softmax(-1), how, beta)


def literal_full(student: np.ndarray, teacher: np.ndarray, divergence: str, beta: float) -> float:
    p, q = softmax(student), softmax(teacher)
    m = beta * q + (1 - beta) * p
    return {"reverse": kl(p, q), "forward": kl(q, p), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}[
        divergence
    ]


def finite_differences(value, point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """d value / d point, one coordinate at a time."""
    gradient = np.zeros_like(point)
    for i in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (value(up) - value(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("divergence", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
def test_full_divergences_are_those_of_the_whole_distributions(divergence, beta):
    logits, teacher, _ = draw(0)
    loss = full_loss(logits, teacher, divergence, beta)
    rows = [
        literal_full(s, t, divergence, beta)
        for s, t in zip(logits.detach().numpy(), teacher.numpy(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(rows)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    exact = finite_differences(
        lambda x: sum(literal_full(s, t, divergence, beta) for s, t in zip(x, teacher.numpy(), strict=True)),
        logits.detach().numpy(),
    )
    np.testing.assert_allclose(gradient.numpy(), exact, atol=1e-7)
    assert full_loss(logits, logits.detach(), divergence, beta).abs().max() < 1e-12


def test_padded_embeddings_of_either_model_are_left_out_of_the_full_divergence():
    logits, teacher, targets = draw(1)
    wide = torch.cat([teacher, torch.full((R, 3), 5.0, dtype=torch.float64)], -1)
    for kind in ("opd_full", "off_policy_fkd"):
        config = LossConfig(kind=kind)
        plain, padded = (
            loss_per_token(
                config,
                logits,
                ResponseTokens(targets, torch.zeros(R), torch.zeros(R), None, lambda rows, t=t: t[rows]),
                ALL,
            )
            for t in (teacher, wide)
        )
        torch.testing.assert_close(plain[0], padded[0])


@pytest.mark.parametrize("advantage", [-1.3, 0.0, 0.8])
@pytest.mark.parametrize("ratio", [0.5, 0.81, 1.0, 1.19, 2.0])
def test_grpo_is_ppos_bound_with_the_groups_advantage(ratio, advantage):
    actor = torch.tensor([-1.5], dtype=torch.float64)
    learner = (actor + math.log(ratio)).requires_grad_()
    loss = grpo_loss(learner, actor, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))
    (gradient,) = torch.autograd.grad(loss.sum(), learner)
    active = ratio * advantage <= clipped * advantage
    assert gradient.item() == pytest.approx(-ratio * advantage if active else 0.0)


def test_group_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.5, 0.5], False).tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])
    std = np.std([1.0, 0.0, 0.5, 0.5])
    assert group_advantages([1.0, 0.0, 0.5, 0.5], True).tolist() == pytest.approx(
        [0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0, 0]
    )
    assert group_advantages([0.7] * 4, True).tolist() == pytest.approx([0.0] * 4), (
        "a group of one reward teaches nothing"
    )


def test_sft_is_cross_entropy_on_the_ground_truth():
    logits, _, targets = draw(2)
    loss, logprobs = loss_per_token(
        LossConfig(kind="sft"), logits, ResponseTokens(targets, torch.zeros(R), torch.zeros(R)), ALL
    )
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(loss, -logprobs)


@pytest.mark.parametrize("clamp", [None, 0.4])
def test_off_policy_rkd_weighs_each_truth_token_by_how_much_more_the_teacher_likes_it(clamp):
    """Gradient of -sum_t r_t log pi(a_t), r_t = log pi_T(a_t) - log pi(a_t) held constant."""
    logits, teacher, targets = draw(3)
    wanted = teacher.log_softmax(-1)[torch.arange(R), targets]
    tokens = ResponseTokens(targets, torch.zeros(R), torch.zeros(R), teacher_logprobs=wanted)
    loss, _ = loss_per_token(LossConfig(kind="off_policy_rkd", clamp=clamp), logits, tokens, ALL)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    p = logits.detach().softmax(-1)
    r = wanted - p.log()[torch.arange(R), targets]
    r = r if clamp is None else r.clamp(-clamp, clamp)
    exact = -r[:, None] * (torch.nn.functional.one_hot(targets, V) - p)
    torch.testing.assert_close(gradient, exact)


def test_off_policy_fkd_is_the_forward_divergence_at_the_truth():
    logits, teacher, targets = draw(4)
    tokens = ResponseTokens(targets, torch.zeros(R), torch.zeros(R), None, lambda rows: teacher[rows])
    loss, _ = loss_per_token(LossConfig(kind="off_policy_fkd"), logits, tokens, ALL)
    torch.testing.assert_close(loss, full_loss(logits, teacher, "forward"))


# --- what the loop brings ---


def test_every_objective_is_declared_once():
    assert set(OBJECTIVES) == set(get_args(LossKind))


def with_rewards(prompt_id: str, rewards: list[float], lengths: list[int]) -> ScoredGroup:
    return replace(make_group(prompt_id, lengths), scores=(), rewards=tuple(rewards))


def test_an_advantage_is_that_of_the_own_group_on_every_token():
    groups = [with_rewards("a", [1.0, 0.0], [2, 3]), with_rewards("b", [0.2, 0.2], [1, 1])]
    signals = signals_of(groups, LossConfig(kind="grpo", advantage_std=False))
    assert [s.advantage.tolist() for s in signals] == [[0.5] * 2, [-0.5] * 3, [0.0], [0.0]]
    learner = LearnerConfig(micro_batch=2, world_size=2)
    plans = [
        plan_update(groups, LossConfig(kind="grpo"), learner, rank, lambda _: NONE, 99) for rank in range(2)
    ]
    assert {p.denominator for p in plans} == {7}
    rows = {r.trajectory.trajectory_id: r for p in plans for m in p.micro_batches for r in m if r.weight}
    assert rows.keys() == {"a/0", "a/1", "b/0", "b/1"} and all(r.scores is None for r in rows.values())


def test_rewards_and_trajectories_must_be_as_many():
    with pytest.raises(ValueError, match="2 trajectories, 1 rewards"):
        with_rewards("a", [1.0], [2, 3])


# --- rewards ---


def answer(*spans):
    spans = tuple(span for span in spans if span)
    return replace(make_group("p").group.trajectories[0], predicted_spans_s=spans)


def test_rewards_by_hand():
    prompt = make_prompt("p", ((2.0, 6.0), (9.0, 10.0)), duration_s=12.0)
    assert iou(answer((4.0, 6.0)), prompt) == pytest.approx(0.5)
    assert time_r1(answer((4.0, 6.0)), prompt) == pytest.approx(0.5 * (1 - 2 / 12) * 1.0)
    assert time_r1(answer((2.0, 6.0)), prompt) == 1.0
    assert [answer_format(answer(s), prompt) for s in ((1.0, 2.0), (2.0, 1.0), (5.0, 13.0), (3.0, 3.0))] == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
    assert [reward(answer(None), prompt) for reward in (iou, time_r1, answer_format)] == [0.0] * 3


def test_rewards_of_sets_by_hand():
    """W1 by the quantile functions: of the truth 2 + 4u below u = 1/2, then 6 + 4u."""
    prompt = make_prompt("p", ((2.0, 4.0), (8.0, 10.0)), duration_s=12.0)
    # 2 + 2u, then 7 + 2u
    both, touching = answer((8.0, 9.0), (2.0, 3.0)), answer((2.0, 3.0), (3.0, 4.0), (8.0, 10.0))
    assert merged_iou(both, prompt) == 0.5 and merged_iou(touching, prompt) == 1.0
    assert temporal_wasserstein(both, prompt) == pytest.approx(math.exp(-0.5 / 4))
    assert temporal_wasserstein(touching, prompt) == 1.0
    assert temporal_wasserstein(answer((10.0, 12.0)), prompt) == pytest.approx(math.exp(-5.0 / 4))
    assert iou(both, prompt) == 0.5 and iou(answer((0.0, 1.0), (2.0, 4.0)), prompt) == 0.0, "the first"
    nothing = [answer(), answer((3.0, 3.0)), answer((4.0, 2.0)), answer((2.0, math.inf))]
    assert [parse_penalty(a, prompt) for a in (both, *nothing)] == [0.0, -1.0, -1.0, -1.0, -1.0]
    assert {r(a, prompt) for a in nothing for r in (merged_iou, temporal_wasserstein)} == {0.0}
    assert temporal_wasserstein(both, make_prompt("u", None)) == 0.0
    assert (
        answer_format(both, prompt) == 1.0 and answer_format(answer((1.0, 2.0), (5.0, 13.0)), prompt) == 0.0
    )


def test_rewards_are_summed_and_named_by_import_path():
    rewards = load_rewards(("video_opd.rewards:iou", "video_opd.rewards:answer_format"))
    assert total_reward(rewards, answer((2.0, 5.0)), make_prompt("p")) == 2.0


@pytest.mark.parametrize(
    "path",
    ["nowhere:iou", "video_opd.rewards:nothing", "video_opd.rewards", "video_opd.rewards:Reward2", ":iou"],
)
def test_a_reward_that_cannot_be_imported_is_one_line(path):
    with pytest.raises(ConfigError, match=r"loss\.rewards") as caught:
        load_rewards([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [1.0, 2.0]])
def test_a_reward_that_is_no_finite_number_is_one_line(value):
    def broken(trajectory, prompt):
        return value

    with pytest.raises(ConfigError, match=r"broken gives .* for trajectory p/0, not a finite number"):
        total_reward([broken], answer((1.0, 2.0)), make_prompt("p"))
