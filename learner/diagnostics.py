"""What a practitioner watches of every update (docs/operations.md): plain numbers of a batch, nothing that trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from video_opd.config import Config, LossConfig
from video_opd.types import ScoredGroup


class TimestampTokens:
    """Which response tokens write a time: those with a digit, and the point between two of them."""

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


@dataclass(frozen=True)
class TokenRecords:
    """Of the response tokens that one rank trained on, in no particular order; float32[tokens] each."""

    learner_logprobs: np.ndarray
    actor_logprobs: np.ndarray
    entropy: np.ndarray  # of the student's distribution

    @staticmethod
    def of_all_ranks(parts: Sequence["TokenRecords"], world_size: int) -> "TokenRecords":
        """This rank's parts with those of the others: the same on every rank."""
        mine = np.concatenate(
            [np.stack([p.learner_logprobs, p.actor_logprobs, p.entropy]) for p in parts], axis=1
        )
        gathered: list[Any] = [mine]
        if world_size > 1:
            gathered = [None] * world_size
            torch.distributed.all_gather_object(gathered, mine)
        return TokenRecords(*np.concatenate(gathered, axis=1))


def policy_signals(tokens: TokenRecords, loss: LossConfig) -> dict[str, float]:
    """The student's entropy; where it sampled, how far the learner's policy is from the actor's, token by token."""
    signals = {"learner/entropy": float(tokens.entropy.mean())}
    if not loss.needs.rollouts:
        return signals
    log_ratio = tokens.learner_logprobs - tokens.actor_logprobs
    ratio = np.exp(log_ratio)
    names, levels = ("p50", "p99", "max"), (0.5, 0.99, 1.0)
    signals |= {
        f"learner/logprob_gap_{n}": float(q)
        for n, q in zip(names, np.quantile(np.abs(log_ratio), levels), strict=True)
    }
    names, levels = ("min", "p01", "p50", "p99", "max"), (0.0, 0.01, 0.5, 0.99, 1.0)
    signals |= {
        f"learner/ratio_{n}": float(q) for n, q in zip(names, np.quantile(ratio, levels), strict=True)
    }
    if loss.max_ratio is not None:
        signals["learner/ratio_truncated_frac"] = float((ratio > loss.max_ratio).mean())
    if loss.kind == "grpo":
        signals["learner/ratio_truncated_frac"] = float((np.abs(ratio - 1.0) > loss.clip).mean())
    return signals


def batch_signals(
    groups: Sequence[ScoredGroup], config: Config, is_time: TimestampTokens
) -> dict[str, float]:
    """What the batch says of itself, the same on every rank: lengths, rewards, the teacher's entropy, the reverse KL."""
    loss, trajectories = config.loss, [t for g in groups for t in g.group.trajectories]
    lengths = [len(t.response_token_ids) for t in trajectories]
    signals = {"learner/num_tokens": float(sum(lengths)), "learner/response_tokens": float(np.mean(lengths))}
    rewards = [r for g in groups for r in g.rewards or ()]
    if rewards:
        flat = [len(set(g.rewards or ())) <= 1 for g in groups]
        signals |= {
            "learner/reward": float(np.mean(rewards)),
            "learner/flat_groups_frac": float(np.mean(flat)),
        }
    scores = [s for g in groups for s in g.scores]
    entropies = [s.entropy for s in scores if s.entropy is not None]
    if entropies:
        signals["teacher/entropy"] = float(np.concatenate(entropies).mean())
    if not scores or not loss.needs.rollouts:
        return signals
    log_ratio = np.concatenate(
        [s.teacher_logprobs - t.actor_logprobs for t, s in zip(trajectories, scores, strict=True)]
    )
    signals |= reverse_kl(log_ratio, np.concatenate([is_time(t.response_token_ids) for t in trajectories]))
    if loss.kind == "opd" and loss.clamp is not None:
        signals["learner/clamped_frac"] = float((np.abs(log_ratio) > loss.clamp).mean())
    if loss.center == "batch":
        signals["learner/center"] = float(
            (log_ratio if loss.clamp is None else np.clip(log_ratio, -loss.clamp, loss.clamp)).mean()
        )
    return signals


def reverse_kl(log_ratio: np.ndarray, is_time: np.ndarray) -> dict[str, float]:
    """KL(pi_old || pi_T) per sampled token in nats: of all, of those that write a time, of the rest.

    log_ratio float32[tokens]: log pi_T - log pi_old. Two unbiased estimates: k1 = -log_ratio, and k3 = exp(log_ratio) - 1
    - log_ratio, which is never negative.
    """
    signals = {}
    for suffix, which in (("", slice(None)), ("_time", is_time), ("_rest", ~is_time)):
        part = log_ratio[which].astype(np.float64)
        if len(part):
            signals[f"learner/reverse_kl{suffix}"] = float(-part.mean())
            signals[f"learner/reverse_kl_k3{suffix}"] = float((np.exp(part) - 1.0 - part).mean())
    return signals
