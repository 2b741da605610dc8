"""The objectives: pure functions of tensors (arXiv 2602.02994 §3.1 and App. C, D.1; docs/algorithm.md).

R response tokens, V vocabulary, K of its tokens. Each loss returns one value per response token, float32[R];
the caller sums them over all ranks and micro-batches, and divides: see denominator_of in batching.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from video_opd.config_learner import LossConfig
from video_opd.models.forward import token_logprobs
from video_opd.types import TeacherScores

MIN_TAIL = 1e-6  # floor of the teacher's tail mass: float32 top-K log-probs do not resolve it further
ADVANTAGE_EPSILON = 1e-4


@dataclass(frozen=True)
class ResponseTokens:
    """The losses' inputs beside the student's logits, for R response tokens."""

    targets: Tensor  # int64[R]
    actor_logprobs: Tensor  # float32[R]; zeros for the ground truth, which nobody sampled
    advantage: Tensor  # float32[R]: see learner/signals.py
    top_k: tuple[Tensor, Tensor] | None = None  # ids int64[R, K], the teacher's log-probs float32[R, K]
    teacher_logits: Callable[[slice], Tensor] | None = None  # rows -> float32[rows, V]
    teacher_logprobs: Tensor | None = None  # float32[R]
    is_forward: Tensor | None = None  # bool[R]; see is_unsure
    distill: Tensor | None = None  # float32[R], weights of the teacher's part; None: 1
    is_demonstration: Tensor | None = None  # bool[R], with on_policy_frac; None: no token is


def sampled_advantage(teacher: np.ndarray, actor: np.ndarray, loss: LossConfig) -> np.ndarray:
    """r_t = log pi_T(a_t|s_t) - log pi_old(a_t|s_t) (eq. 5) for all tokens of the batch, float32[tokens].

    Options, off in the paper: `clamp` bounds |r|; `center` then subtracts the batch mean, a baseline. That
    mean is of r alone: weights (learner/signals.py) come after it, so weighted signals need not sum to 0.
    """
    advantage = teacher - actor
    if loss.clamp is not None:
        advantage = np.clip(advantage, -loss.clamp, loss.clamp)
    if loss.center == "batch":
        advantage = advantage - advantage.mean()
    return advantage.astype(np.float32)


def group_advantages(rewards: Sequence[float], divide_by_std: bool) -> np.ndarray:
    """GRPO's (r - mean) / (std + 1e-4) over a prompt's G responses, float32[G]; Dr. GRPO's is r - mean."""
    centred = np.asarray(rewards, np.float64) - np.mean(rewards)
    return (centred / (np.std(rewards) + ADVANTAGE_EPSILON) if divide_by_std else centred).astype(np.float32)


def sampled_loss(learner: Tensor, actor: Tensor, advantage: Tensor, max_ratio: float | None = None) -> Tensor:
    """-min(rho_t, max_ratio) r_t with rho_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t) (eq. 6; max_ratio is ours).

    At rho = 1 its gradient is an unbiased estimate of that of KL(pi_theta || pi_T) at s_t (App. A, eq. 11).
    """
    ratio = (learner - actor).exp()
    return -(ratio if max_ratio is None else ratio.clamp(max=max_ratio)) * advantage


def with_tail(logits: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [R, K + 1] of student and teacher: of K tokens, and of all other mass (arXiv 2603.25562).

    Without that bucket the student escapes by moving mass out of the set. logits[R, V] of the student;
    int64[R, K]: the likeliest tokens of the teacher, or of the student when it sampled; the teacher's
    log-probs of them, float32[R, K]. Where they are the whole vocabulary, K = V, there is no such bucket.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    student = logits.gather(-1, ids) - normaliser
    if ids.shape[-1] == logits.shape[-1]:
        return student, teacher
    tail = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True) - normaliser
    teacher_tail = (1.0 - teacher.exp().sum(-1, keepdim=True)).clamp(min=MIN_TAIL).log()
    return torch.cat([student, tail], -1), torch.cat([teacher, teacher_tail], -1)


def divergence(
    student: Tensor,
    teacher: Tensor,
    how: str = "reverse",
    beta: float = 0.5,
    clamp: float | None = None,
    is_forward: Tensor | None = None,
) -> Tensor:
    """A divergence of two distributions over B tokens or buckets, from log-probs[R, B] of both: float32[R].

    reverse: KL(pi_theta || pi_T). forward: KL(pi_T || pi_theta). jsd: beta KL(pi_T || m) + (1 - beta)
    KL(pi_theta || m) with m = beta pi_T + (1 - beta) pi_theta (generalised Jensen-Shannon, arXiv 2306.13649).

    Options of `reverse`: `clamp` bounds the log-ratio, or a very sure teacher would dominate the batch with a
    few tokens. The log-ratio is constant in the gradient: the same gradient without clamp (probabilities sum
    to one), a policy gradient with it. The gradients of the others are bounded anyway. is_forward, bool[R]:
    rows with `forward` in place of it, without clamp; see is_unsure.
    """
    if how == "jsd":
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)
    if how == "forward":
        return _kl(teacher, student)
    log_ratio = (student - teacher).detach()
    if clamp is not None:
        log_ratio = log_ratio.clamp(-clamp, clamp)
    reverse = (student.exp() * log_ratio).sum(-1)
    return reverse if is_forward is None else torch.where(is_forward, _kl(teacher, student), reverse)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs[R, B], float32[R]."""
    return (p.exp() * (p - q)).sum(-1)


def is_unsure(scores: Sequence[TeacherScores], loss: LossConfig) -> np.ndarray | None:
    """bool[tokens]: where the teacher's entropy is at least loss.forward_kl_entropy nats; None: not set.

    After entropy-aware distillation (arXiv 2603.07079). Theirs adds the forward KL, over the teacher's top
    16, to the sampled reverse KL where the entropy of its whole distribution is above 0.8. Ours takes the
    forward KL in place of the reverse one, both over the same tokens. The entropy is that of the whole
    distribution for opd_full; for opd_topk that of the K tokens and the bucket of the rest, which is at most
    as large.
    """
    if loss.forward_kl_entropy is None:
        return None
    if loss.kind == "opd_full":
        entropies = [s.entropy for s in scores if s.entropy is not None]
    else:
        entropies = [_entropy_with_tail(s.top_k.logprobs) for s in scores if s.top_k is not None]
    assert len(entropies) == len(scores), "the teacher's entropy is not known"
    return np.concatenate(entropies) >= loss.forward_kl_entropy


def _entropy_with_tail(logprobs: np.ndarray) -> np.ndarray:
    """float64[N] of float32[N, K]; with_tail's buckets."""
    inside = logprobs.astype(np.float64)
    tail = np.maximum(1.0 - np.exp(inside).sum(-1), 0.0)
    return -(np.exp(inside) * inside).sum(-1) - tail * np.log(np.maximum(tail, MIN_TAIL))


def grpo_loss(learner: Tensor, actor: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho_t A, clip(rho_t, 1 - clip, 1 + clip) A), A the group's advantage (GRPO, arXiv 2402.03300)."""
    ratio = (learner - actor).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def truth_loss(learner: Tensor, teacher: Tensor, clamp: float | None) -> Tensor:
    """-rho_t r_t at tokens that nobody sampled: r_t = log pi_T - log pi is against the current student.

    learner, teacher: float32[R], log-probs of the tokens. rho_t is 1; r_t is constant, within `clamp`.
    """
    now = learner.detach()
    advantage = teacher - now
    if clamp is not None:
        advantage = advantage.clamp(-clamp, clamp)
    return sampled_loss(learner, now, advantage)


def reference_kl(learner: Tensor, reference: Tensor) -> Tensor:
    """GRPO's k3 estimate of KL(pi_theta || pi_ref): x - 1 - log x >= 0 with x = pi_ref / pi_theta."""
    log_ratio = reference - learner
    return log_ratio.exp() - 1.0 - log_ratio


def loss_per_token(
    loss: LossConfig, logits: Tensor, tokens: ResponseTokens, rows: slice
) -> tuple[Tensor, Tensor]:
    """The configured loss of some rows, from the student's logits[rows, V], and their tokens' log-probs."""
    learner = token_logprobs(logits, tokens.targets[rows])
    actor, advantage = tokens.actor_logprobs[rows], tokens.advantage[rows]
    is_forward = None if tokens.is_forward is None else tokens.is_forward[rows]
    match loss.kind:
        case "opd":
            value = sampled_loss(learner, actor, advantage, loss.max_ratio)
            if tokens.is_demonstration is not None:
                teacher, distill = tokens.teacher_logprobs, tokens.distill
                assert teacher is not None and distill is not None, "a demonstration needs both"
                of_truth = distill[rows] * truth_loss(learner, teacher[rows], loss.clamp)
                value = torch.where(tokens.is_demonstration[rows], of_truth, value)
        case "opd_topk":
            assert tokens.top_k is not None, "opd_topk needs the teacher's top-K"
            both = with_tail(logits, *(of_tokens[rows] for of_tokens in tokens.top_k))
            value = divergence(*both, loss.divergence, loss.beta, loss.clamp, is_forward)
        case "opd_full" | "off_policy_fkd":
            assert tokens.teacher_logits is not None, f"{loss.kind} needs the teacher's logits"
            teacher = tokens.teacher_logits(rows)
            shared = min(logits.shape[-1], teacher.shape[-1])  # the rest are padded embeddings
            both = logits[:, :shared].log_softmax(-1), teacher[:, :shared].log_softmax(-1)
            how = loss.divergence if loss.kind == "opd_full" else "forward"
            value = divergence(*both, how, loss.beta, is_forward=is_forward)
        case "grpo":
            value = grpo_loss(learner, actor, advantage, loss.clip)
            if loss.kl_coef:
                assert tokens.teacher_logprobs is not None, "kl_coef needs a reference"
                value = value + loss.kl_coef * reference_kl(learner, tokens.teacher_logprobs[rows])
        case "off_policy_rkd":
            assert tokens.teacher_logprobs is not None, "off_policy_rkd needs the teacher's log-probs"
            value = truth_loss(learner, tokens.teacher_logprobs[rows], loss.clamp)
        case "sft":
            value = -learner
    if loss.kind in ("opd_topk", "opd_full") and tokens.distill is not None:
        value = tokens.distill[rows] * value
        if loss.task_weight:
            value = value + sampled_loss(learner, actor, advantage, loss.max_ratio)
    return value, learner.detach()
