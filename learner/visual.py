"""Visual advantage: how much more the teacher likes a token because it sees the video (arXiv 2605.21924)."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from video_opd.config_learner import LossConfig
from video_opd.types import ScoredGroup, TeacherScores

EPSILON = 1e-6  # added to the standard deviation over the responses to a prompt


def visual_advantage(scores: TeacherScores) -> np.ndarray:
    """v_t = max(0, log pi_T(a_t | video) - log pi_T(a_t | grey frames)) (eq. 2), float32[N]."""
    assert scores.grey_logprobs is not None, "loss.visual_weight needs the teacher's scores on grey frames"
    return np.maximum(scores.teacher_logprobs - scores.grey_logprobs, 0.0)


def visual_weights(groups: Sequence[ScoredGroup], loss: LossConfig) -> list[np.ndarray]:
    """w_t = u_i h_t of each trajectory's tokens, float32[N]: factors of their distillation loss (eq. 3 to 6).

    h_t: with p = visual_frac and alpha = visual_weight, the ceil(p N) tokens of largest v_t (earlier ones of
    equals) have the share alpha of a response's weight, the others the rest, in equal parts: alpha N / N_high
    and (1 - alpha) N / N_low, or 1 where no token is left. Its mean over a response is 1.
    u_i: over the G responses to a prompt, G times the softmax of the z-scores of their means of v_t. Its mean
    over a prompt is 1. The paper's losses of a response are means over tokens; here loss.reduction divides.
    """
    weights: list[np.ndarray] = []
    for group in groups:
        advantages = [visual_advantage(scores) for scores in group.scores]
        means = np.array([v.mean(dtype=np.float64) for v in advantages])
        scaled = np.exp((means - means.mean()) / (means.std() + EPSILON)) if len(means) else means
        of_responses = scaled * len(means) / scaled.sum()
        tokens = zip(of_responses, advantages, strict=True)
        weights += [(u * _token_weights(v, loss)).astype(np.float32) for u, v in tokens]
    return weights


def _token_weights(advantage: np.ndarray, loss: LossConfig) -> np.ndarray:
    """h_t, float64[N]."""
    assert loss.visual_weight is not None
    num, num_high = len(advantage), ceil(loss.visual_frac * len(advantage))
    if num_high == num:
        return np.ones(num)
    weights = np.full(num, (1.0 - loss.visual_weight) * num / (num - num_high))
    weights[np.argsort(-advantage, kind="stable")[:num_high]] = loss.visual_weight * num / num_high
    return weights
