"""What the stages share: the reference in float32, comparisons, and memory against the plan."""

import gc
from collections.abc import Sequence

import numpy as np
import psutil
import torch

from benchmarks.gpu_check.models import make_config
from benchmarks.gpu_check.stage import Bench, CheckError, NotHere
from preflight.inputs import make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan
from video_opd.config import Config
from video_opd.datasets import read_prompts
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, load_model, token_logprobs
from video_opd.models.model_files import read_model_info
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, Prompt

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Of log-probs, by the dtype that is compared with float32; random weights give them a deviation of 2."""
MEMORY_TOLERANCE = 0.15
Arrays = Sequence[np.ndarray]


class Setting:
    """Config, prompts and encoder of one model."""

    def __init__(self, bench: Bench, *overrides: str):
        self.bench, self.config = bench, make_config(bench, *overrides)
        self.tolerance = TOLERANCE[bench.dtype]
        multiple = read_model_info(self.config.student).size_multiple
        self.prompts: list[Prompt] = read_prompts(self.config.data.train, self.config.video, multiple)
        self.encoder = PromptEncoder(self.config.student, self.config.prompt, self.config.video)
        self.encoded = [self.encoder.encode(p) for p in self.prompts]

    def float32_model(self, folder: str | None = None) -> VideoLLM:
        """transformers' model of a folder, the student's by default, on the device."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return load_model(folder or self.config.student, "float32").eval().to(self.bench.device)

    @torch.no_grad()
    def exact(self, model: VideoLLM, responses: Arrays, encoded: Sequence[EncodedPrompt] = ()) -> Arrays:
        """float32[N] of each response to each prompt, by a plain pass over one sequence."""
        found = []
        for prompt, response in zip(encoded or self.encoded, responses, strict=True):
            batch = collate([prompt], [response], self.encoder.tokenizer.pad_token_id, self.bench.device)
            found.append(token_logprobs(ResponseLogits(model)(batch), batch.targets).cpu().numpy())
        return found

    def random_responses(self) -> Arrays:
        """int32[N] for each prompt: words of the tokenizer."""
        rng, num = np.random.default_rng(0), self.config.rollout.max_response_tokens
        return [rng.integers(0, 500, num).astype(np.int32) for _ in self.prompts]


def gap(found: Arrays, exact: Arrays) -> float:
    """The largest difference. Raises CheckError where a value is missing or not finite."""
    if [len(f) for f in found] != [len(e) for e in exact]:
        raise CheckError(f"{[len(f) for f in found]} values instead of {[len(e) for e in exact]}")
    differences = np.abs(np.concatenate(list(found)) - np.concatenate(list(exact)))
    if not np.isfinite(differences).all():
        raise CheckError(f"{np.count_nonzero(~np.isfinite(differences))} log-probs are not finite")
    return float(differences.max())


def within(found: Arrays, exact: Arrays, tolerance: float, what: str) -> str:
    """Says how far apart they are. Raises CheckError beyond the tolerance."""
    largest = gap(found, exact)
    told = f"{what}: at most {largest:.2g} from float32, allowed {tolerance:g}"
    if largest > tolerance:
        raise CheckError(told)
    return told


def within_share(found: float, exact: float, share: float, what: str) -> str:
    """As `within`, relative."""
    told = f"{what} {found:.6g}, in float32 {exact:.6g}, allowed {share:.1%}"
    if not abs(found - exact) <= share * abs(exact):
        raise CheckError(told)
    return told


def release() -> None:
    """Frees what nothing refers to any more, and counts the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check_memory(config: Config, role: str) -> str:
    """This process's peak on the GPU against the plan. Raises CheckError beyond MEMORY_TOLERANCE."""
    (planned,) = (r for r in memory_plan(config, make_draft(config), None).roles if r.role == role)
    if planned.device is None:
        held = psutil.Process().memory_info().rss
        sizes = f"plan {planned.host.peak_bytes / GIB:.2f} GiB, this process holds {held / GIB:.2f} GiB"
        raise NotHere(f"not compared on a CPU, where a process holds much else: {sizes}")
    measured, parts = device_bytes()
    ratio = measured / planned.device.peak_bytes
    terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in planned.device.terms.items())
    told = f"measured {measured / GIB:.2f} GiB ({parts}), {ratio:.2f} of the plan's: {terms}"
    if abs(ratio - 1) > MEMORY_TOLERANCE:
        raise CheckError(told)
    return told


def device_bytes() -> tuple[int, str]:
    """The peak of this process on an otherwise idle GPU, and its parts in GiB.

    Tensors at their peak, what CUDA graphs keep beside them, and what torch does not allocate: the context.
    """
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    graphs = sum(s["total_size"] - s["allocated_size"] for s in segments)
    free, total = torch.cuda.mem_get_info()
    tensors, outside = torch.cuda.max_memory_allocated(), total - free - torch.cuda.memory_reserved()
    sizes = {"tensors": tensors, "CUDA graphs": graphs, "outside torch": outside}
    return sum(sizes.values()), ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
