"""A tree of three sequences against each of them alone, and the memory of its pass against the plan's."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from benchmarks.gpu_check.measure import MEMORY_SHARE, TOLERANCE, Arrays, Setting, gap
from benchmarks.gpu_check.part import CheckError
from preflight.memory import GIB, TEACHER_LOGIT_COPIES, learner_phases, scoring_bytes
from preflight.model_shapes import read_shapes
from preflight.packing import Pass, TreeSize, pass_of
from video_opd.config import Config
from video_opd.models.forward import ResponseBatch, ResponseLogits, VideoLLM, collate, token_logprobs
from video_opd.types import EncodedPrompt

GRADIENT_SHARE = {"float32": 1e-3, "bfloat16": 0.05}  # of the norm of all gradients together
NUM_SEQUENCES = 3

Sequences = tuple[Sequence[EncodedPrompt], Arrays]


def three_of_a_clip(of: Setting) -> Sequences:
    """Two responses to a prompt, and one to another prompt about its clip; not of one length."""
    first, second = of.encoded[:2]
    own = of.random_responses()
    return [first, first, second], [own[0], own[1][:-1], own[0][::-1].copy()]


def compare(of: Setting, model: VideoLLM, dtype: str, trains: bool) -> str:
    """Log-probs of a tree, and with `trains` gradients, against those of passes over one sequence.

    Raises CheckError, also if the pass over the tree takes more memory than is planned for it."""
    sequences = three_of_a_clip(of)
    model.zero_grad()
    batches = [_collate(of, [p], [r]) for p, r in zip(*sequences, strict=True)]
    alone = [_logprobs(model, batch, trains) for batch in batches]
    separate = _take_gradients(model)
    if trains:
        for parameter in model.parameters():  # as from a second micro-batch on
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch, before = _collate(of, *sequences), _start_counting()
    packed = _logprobs(model, batch, trains)
    taken = _most_bytes() - before
    largest = gap([packed], [np.concatenate(alone)])
    told = f"{dtype}: log-probs at most {largest:.2g} from those of separate sequences"
    if largest > TOLERANCE[dtype]:
        raise CheckError(f"{told}, allowed {TOLERANCE[dtype]:g}")
    if trains:
        norm, share = _norm(separate), GRADIENT_SHARE[dtype]
        apart = _norm(a - b for a, b in zip(separate, _take_gradients(model), strict=True))
        told += f", gradients {apart / norm:.2g} of their norm"
        if not apart <= share * norm:
            raise CheckError(f"{told}, allowed {share:g}")
    return told + _against_plan(taken, planned_bytes(of.config, pass_over(batch), dtype, trains))


def pass_over(batch: ResponseBatch) -> Pass:
    """What the plan is made from, for `sdpa`."""
    trees = [
        TreeSize(t.prefix, t.prefix**2, len(t.members), sum(t.branches), sum(n * n for n in t.branches))
        for t in batch.trees
    ]
    video_tokens = int((batch.separate.mm_token_type_ids[list(batch.clips)] > 0).sum())
    return pass_of(trees, video_tokens, "sdpa")


def planned_bytes(config: Config, of: Pass, dtype: str, trains: bool) -> int:
    """Of such a pass, beside weights and gradients."""
    shapes = read_shapes(config.student)
    if trains:
        options = {"dtype": dtype, "micro_batch": NUM_SEQUENCES, "gradient_checkpointing": False}
        learner = config.learner.model_copy(update=options)
        phases = learner_phases(config.model_copy(update={"learner": learner}), shapes, of)
        return max(sum(terms.values()) for terms in phases.values())
    rows = NUM_SEQUENCES * config.rollout.max_response_tokens
    logits = 4 * TEACHER_LOGIT_COPIES * rows * shapes.text.vocab_size
    scoring = scoring_bytes(config.teacher_pool.model_copy(update={"dtype": dtype}), shapes, of)
    return max(logits, sum(scoring.values()))


def _collate(of: Setting, prompts: Sequence[EncodedPrompt], responses: Arrays) -> ResponseBatch:
    return collate(prompts, responses, of.encoder.tokenizer.pad_token_id, of.bench.device)


def _logprobs(model: VideoLLM, batch: ResponseBatch, trains: bool) -> np.ndarray:
    """float32[R]; `trains`: adds the gradient of their sum."""
    with torch.set_grad_enabled(trains):
        logprobs = token_logprobs(ResponseLogits(model)(batch), batch.targets)
    if trains:
        logprobs.sum().backward()
    return logprobs.detach().cpu().numpy()


def _take_gradients(model: VideoLLM) -> list[torch.Tensor]:
    """Of all parameters that have one, in float32; they have none afterwards."""
    taken = [p.grad.float() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return taken


def _norm(of: Iterable[torch.Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in of) ** 0.5


def _start_counting() -> int:
    """The bytes of tensors on the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _most_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _against_plan(taken: int, planned: int) -> str:
    if not torch.cuda.is_available():
        return ""
    told = f", {taken / GIB:.2f} GiB, planned {planned / GIB:.2f}"
    if taken > (1 + MEMORY_SHARE) * planned:
        raise CheckError(f"{told[2:]}, allowed {MEMORY_SHARE:.0%} more")
    return told
