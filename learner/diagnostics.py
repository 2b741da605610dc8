"""Diagnostics of an update (docs/operations.md): plain numbers that training does not use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from learner.loss import is_unsure
from learner.signals import signal_metrics
from learner.visual import visual_advantage
from video_opd.config import Config
from video_opd.config_learner import LossConfig
from video_opd.types import ScoredGroup

_LEVELS = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}


class TimestampTokens:
    """Marks the response tokens that write a time: those with a digit, and a point between two of them."""

    def __init__(self, tokenizer: Any):
        texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._digit = np.array([any(c in "0123456789" for c in text) for text in texts])
        self._point = np.array([text == "." for text in texts])

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """bool[N] of int32[N]."""
        digit = self._digit[ids]
        between = np.zeros_like(digit)
        between[1:-1] = self._point[ids[1:-1]] & digit[:-2] & digit[2:]
        return digit | between


class TokenRecords(NamedTuple):
    """The response tokens that one rank trained on, in no particular order; float32[tokens] each."""

    learner_logprobs: np.ndarray
    actor_logprobs: np.ndarray
    entropy: np.ndarray  # of the student's distribution
    is_demonstration: np.ndarray  # 1 or 0

    @staticmethod
    def of_all_ranks(parts: Sequence["TokenRecords"], world_size: int) -> "TokenRecords":
        """The parts of all ranks together: the same on every rank."""
        mine = np.concatenate(parts, axis=1)  # float32[4, tokens]
        gathered: list[Any] = [mine] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(gathered, mine)
        return TokenRecords(*np.concatenate(gathered, axis=1))


def policy_diagnostics(tokens: TokenRecords, loss: LossConfig) -> dict[str, float]:
    """The student's entropy; with rollouts, how far the learner's policy is from the actor's, per token.

    Demonstrations count in their own negative log-likelihood alone.
    """
    metrics, shown = {}, tokens.is_demonstration > 0
    if shown.any():
        metrics["learner/demonstration_nll"] = -float(tokens.learner_logprobs[shown].mean())
        tokens = TokenRecords(*(of_tokens[~shown] for of_tokens in tokens))
    if not len(tokens.entropy):
        return metrics
    metrics["learner/entropy"] = float(tokens.entropy.mean())
    if not loss.needs.rollouts:
        return metrics
    log_ratio = tokens.learner_logprobs - tokens.actor_logprobs
    ratio = np.exp(log_ratio)
    metrics |= _quantiles("learner/logprob_gap", np.abs(log_ratio), "p50", "p99", "max")
    metrics |= _quantiles("learner/ratio", ratio, *_LEVELS)
    if loss.kind == "grpo":
        metrics["learner/ratio_truncated_frac"] = float((np.abs(ratio - 1.0) > loss.clip).mean())
    elif loss.max_ratio is not None:
        metrics["learner/ratio_truncated_frac"] = float((ratio > loss.max_ratio).mean())
    return metrics


def _quantiles(name: str, values: np.ndarray, *levels: str) -> dict[str, float]:
    quantiles = np.quantile(values, [_LEVELS[level] for level in levels])
    return {f"{name}_{level}": float(q) for level, q in zip(levels, quantiles, strict=True)}


def batch_diagnostics(
    groups: Sequence[ScoredGroup], config: Config, is_time: TimestampTokens, baseline: float | None = None
) -> dict[str, float]:
    """Of the batch, the same on every rank: lengths, signals, the teacher's entropy, rollouts' KL."""
    loss, trajectories = config.loss, [t for g in groups for t in g.group.trajectories]
    lengths = [len(t.response_token_ids) for t in trajectories]
    metrics = {"learner/num_tokens": float(sum(lengths)), "learner/response_tokens": float(np.mean(lengths))}
    metrics |= signal_metrics(groups, loss, baseline)
    scores = [s for g in groups for s in g.scores]
    if entropies := [s.entropy for s in scores if s.entropy is not None]:
        metrics["teacher/entropy"] = float(np.concatenate(entropies).mean())
    if not scores or not loss.needs.rollouts:
        return metrics
    pairs = [(t, s) for t, s in zip(trajectories, scores, strict=True) if not t.is_demonstration]
    if not pairs:
        return metrics
    log_ratio = np.concatenate([s.teacher_logprobs - t.actor_logprobs for t, s in pairs])
    times = np.concatenate([is_time(t.response_token_ids) for t, _ in pairs])
    metrics |= reverse_kl(log_ratio, times)
    if loss.visual_weight:
        advantage = np.concatenate([visual_advantage(s) for _, s in pairs])
        metrics["learner/visual_advantage"] = float(advantage.mean())
        if times.any():
            metrics["learner/visual_advantage_time"] = float(advantage[times].mean())
    if loss.kind == "opd" and loss.clamp is not None:
        metrics["learner/clamped_frac"] = float((np.abs(log_ratio) > loss.clamp).mean())
    if (unsure := is_unsure(scores, loss)) is not None:
        metrics["learner/forward_kl_frac"] = float(unsure.mean())
    if loss.center == "batch":
        clamped = log_ratio if loss.clamp is None else np.clip(log_ratio, -loss.clamp, loss.clamp)
        metrics["learner/center"] = float(clamped.mean())
    return metrics


def reverse_kl(log_ratio: np.ndarray, is_time: np.ndarray) -> dict[str, float]:
    """KL(pi_old || pi_T) per sampled token in nats: of all tokens, of those that write a time, of the rest.

    log_ratio r = log pi_T - log pi_old, float32[tokens]. Unbiased: k1 = -r, and k3 = exp(r) - 1 - r >= 0.
    """
    metrics = {}
    for suffix, which in (("", slice(None)), ("_time", is_time), ("_rest", ~is_time)):
        part = log_ratio[which].astype(np.float64)
        if len(part):
            metrics[f"learner/reverse_kl{suffix}"] = float(-part.mean())
            metrics[f"learner/reverse_kl_k3{suffix}"] = float((np.exp(part) - 1.0 - part).mean())
    return metrics
