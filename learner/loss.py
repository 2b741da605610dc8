"""The reverse-KL losses of on-policy distillation: pure functions of tensors (ALGORITHM.md section 1).

R response tokens, V vocabulary, K teacher tokens. Each function returns one value per response token, float32[R];
the caller sums them and divides by the token count of the whole batch, over all ranks and micro-batches.
"""

import math

import numpy as np
import torch

from video_opd.config import LossConfig
from video_opd.modeling import token_logprobs

MIN_TAIL = 1e-6  # floor of the teacher's tail mass: float32 top-K log-probs do not resolve it further


def pointwise_signal(teacher_logprobs: np.ndarray, actor_logprobs: np.ndarray, loss: LossConfig) -> np.ndarray:
    """r_t = log pi_T(a_t|s_t) - log pi_old(a_t|s_t) for all tokens of the batch, float32[tokens].

    Options, both off in the paper: `clamp` bounds |r|; `center` then subtracts the mean over the batch, a baseline
    that removes the common push away from every sampled token.
    """
    signal = teacher_logprobs - actor_logprobs
    if loss.clamp is not None:
        signal = np.clip(signal, -loss.clamp, loss.clamp)
    if loss.center == "batch":
        signal = signal - signal.mean()
    return signal.astype(np.float32)


def sampled_loss(
    learner_logprobs: torch.Tensor, actor_logprobs: torch.Tensor, signal: torch.Tensor, max_ratio: float | None = None
) -> torch.Tensor:
    """-min(rho_t, max_ratio) * r_t with rho_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t) (Video-OPD, eq. of the update).

    At rho = 1 the gradient is an unbiased estimate of that of KL(pi_theta || pi_T) at the visited states.
    """
    ratio = (learner_logprobs - actor_logprobs).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    return -ratio * signal


def topk_loss(
    logits: torch.Tensor, top_k_ids: torch.Tensor, top_k_logprobs: torch.Tensor, clamp: float | None = None
) -> torch.Tensor:
    """Reverse KL on the teacher's K tokens plus one bucket for the remaining mass on both sides.

    sum_b pi_theta(b) log(pi_theta(b)/pi_T(b)) over the K tokens and the tail. Without the tail bucket the student
    escapes by moving mass out of the set (2603.25562). The log-ratio is held constant in the gradient, which changes
    nothing as it stands (the buckets' probabilities sum to one), and keeps the gradient a policy gradient when `clamp`
    bounds the log-ratio: a very sure teacher otherwise drowns the batch in a few tokens.
    logits[R, V] of the student; top_k_ids int64[R, K] and top_k_logprobs float32[R, K] of the teacher.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    student = logits.gather(-1, top_k_ids) - normaliser
    teacher = top_k_logprobs
    if top_k_ids.shape[-1] < logits.shape[-1]:
        tail = logits.scatter(-1, top_k_ids, -math.inf).logsumexp(-1, keepdim=True) - normaliser
        teacher_tail = (1.0 - teacher.exp().sum(-1, keepdim=True)).clamp(min=MIN_TAIL).log()
        student, teacher = torch.cat([student, tail], -1), torch.cat([teacher, teacher_tail], -1)
    log_ratio = (student - teacher).detach()
    if clamp is not None:
        log_ratio = log_ratio.clamp(-clamp, clamp)
    return (student.exp() * log_ratio).sum(-1)


def loss_per_token(
    loss: LossConfig,
    logits: torch.Tensor,
    targets: torch.Tensor,
    actor_logprobs: torch.Tensor,
    signal: torch.Tensor,
    top_k: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The configured loss and the learner's log-probs of the response tokens, both float32[R]."""
    learner_logprobs = token_logprobs(logits, targets)
    if loss.kind == "sampled":
        return sampled_loss(learner_logprobs, actor_logprobs, signal, loss.max_ratio), learner_logprobs.detach()
    assert top_k is not None, "loss.kind=topk needs the teacher's top-K"
    return topk_loss(logits, *top_k, clamp=loss.clamp), learner_logprobs.detach()
