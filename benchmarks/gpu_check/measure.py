"""What the parts share: float32 as the reference, comparisons, and memory against the plan."""

import gc
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from transformers.integrations import sdpa_attention

from benchmarks.gpu_check.models import make_config
from benchmarks.gpu_check.part import Bench, CheckError, NotHere
from preflight.devices import Utilisation, device_name
from preflight.inputs import make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan
from preflight.time_fit import time_plan
from preflight.time_plan import TimePlan
from video_opd.config import Config
from video_opd.datasets import read_sources
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, load_model, token_logprobs
from video_opd.models.model_files import read_model_info
from video_opd.models.policy import Policy
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, Prompt

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of a log-prob, by the dtype that is compared with float32. Over the vocabulary they deviate by about 2."""
NOTICED = 5  # a change that must be noticed is this many tolerances
MEMORY_SHARE, MEMORY_LESS = 0.15, 0.25  # of the plan: at most more, and less; the plan rounds up
Arrays = Sequence[np.ndarray]


class Setting:
    """Config, prompts and encoder of one model."""

    def __init__(self, bench: Bench, *overrides: str):
        self.bench, self.config = bench, make_config(bench, *overrides)
        self.tolerance = TOLERANCE[bench.dtype]
        multiple = read_model_info(self.config.student).size_multiple
        self.prompts: list[Prompt] = read_sources(self.config.data, self.config.video, multiple).prompts
        self.encoder = PromptEncoder(self.config.student, self.config.prompt, self.config.video)
        self.encoded = [self.encoder.encode(p) for p in self.prompts]
        self.policy = Policy(self.config.rollout.temperature, self.encoder.pad_ids, bench.device)

    def random_responses(self) -> Arrays:
        """int32[N] for each prompt: words of the tokenizer."""
        rng, num_tokens = np.random.default_rng(0), self.config.rollout.max_response_tokens
        return [rng.integers(0, 500, num_tokens).astype(np.int32) for _ in self.prompts]

    def float32_model(self, folder: str | None = None) -> VideoLLM:
        """transformers' model of a folder, by default the student's, on the device."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        model = load_model(folder or self.config.student, "float32").eval().to(self.bench.device)
        model.model.forward = with_as_many_keys(model.model.forward)
        return model

    @torch.no_grad()
    def exact(self, model: VideoLLM, encoded: Sequence[EncodedPrompt], responses: Arrays) -> Arrays:
        """float32[N] of each response: its tokens' log-probs, by a pass over one sequence."""
        found = []
        for prompt, response in zip(encoded, responses, strict=True):
            batch = collate([prompt], [response], self.encoder.tokenizer.pad_token_id, self.bench.device)
            logits = self.policy(ResponseLogits(model)(batch))
            found.append(token_logprobs(logits, batch.targets).cpu().numpy())
        return found


def with_as_many_keys(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A pass in which attention gets as many key heads as heads, repeated.

    With fewer, float32 attention would keep 8 GiB of scores in each layer: preflight/activations.py.
    """

    def passed(*arguments: Any, **options: Any) -> Any:
        with patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False):
            return forward(*arguments, **options)

    return passed


def gap(found: Arrays, exact: Arrays) -> float:
    """The largest difference. Raises CheckError where values are missing or not finite."""
    if [len(f) for f in found] != [len(e) for e in exact]:
        raise CheckError(f"{[len(f) for f in found]} values instead of {[len(e) for e in exact]}")
    differences = np.abs(np.concatenate(list(found)) - np.concatenate(list(exact)))
    if not np.isfinite(differences).all():
        raise CheckError(f"{np.count_nonzero(~np.isfinite(differences))} log-probs are not finite")
    return float(differences.max())


def within(found: Arrays, exact: Arrays, tolerance: float) -> str:
    """Says how far log-probs are apart. Raises CheckError beyond the tolerance."""
    largest = gap(found, exact)
    told = f"log-probs at most {largest:.2g} from float32's, allowed {tolerance:g}"
    if largest > tolerance:
        raise CheckError(told)
    return told


def within_share(what: str, found: float, expected: float, share: float) -> str:
    """As `within`, for one number and relative."""
    told = f"{what} {found:.5g}, expected {expected:.5g} within {share:.1%}"
    if not abs(found - expected) <= share * abs(expected):  # nan is beyond
        raise CheckError(told)
    return told


def release() -> None:
    """Frees what nothing refers to any more, and counts the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check_memory(config: Config, role: str) -> str:
    """This process's peak on the GPU against the plan's. Raises CheckError far from it."""
    (planned,) = (r for r in memory_plan(config, make_draft(config), None).roles if r.role == role)
    if planned.device is None:
        held = psutil.Process().memory_info().rss
        sizes = f"{held / GIB:.2f} GiB are in use, the plan says {planned.host.peak_bytes / GIB:.2f}"
        raise NotHere(f"a CPU's memory also holds Python and its libraries, so it is not compared: {sizes}")
    measured, parts = device_bytes()
    terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in planned.device.terms.items())
    peak, expected = measured / GIB, planned.device.peak_bytes / GIB
    told = f"peak {peak:.2f} GiB, planned {expected:.2f}; found {parts}; planned {terms}"
    if not -MEMORY_LESS <= peak / expected - 1 <= MEMORY_SHARE:
        raise CheckError(f"{told}; allowed {MEMORY_LESS:.0%} less to {MEMORY_SHARE:.0%} more")
    return told


def planned(config: Config, seconds_of: Callable[[TimePlan], float]) -> str:
    """What the plan of time says, to put after measured seconds: "planned 0.52", or that there is no plan."""
    if not torch.cuda.is_available():
        return "no plan on a CPU"
    if (device := device_name(name := torch.cuda.get_device_name())) is None:
        return f"no plan for {name}"
    draft = make_draft(config)
    plan = time_plan(memory_plan(config, draft, None), draft, device, Utilisation())
    return f"planned {seconds_of(plan):.2f}" if isinstance(plan, TimePlan) else plan


def device_bytes() -> tuple[int, str]:
    """The peak of this process on a GPU that nothing else uses, and its parts in GiB.

    Tensors at their peak, what CUDA graphs keep beside them, and what torch did not allocate: the context.
    """
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    graphs = sum(s["total_size"] - s["allocated_size"] for s in segments)
    free, total = torch.cuda.mem_get_info()
    tensors, others = torch.cuda.max_memory_allocated(), total - free - torch.cuda.memory_reserved()
    sizes = {"tensors": tensors, "CUDA graphs": graphs, "not torch's": others}
    return sum(sizes.values()), ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
