"""Starting vLLM and feeding it encoded prompts: what rollout and the vLLM teacher share."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.config import RolloutConfig, TeacherConfig
from video_opd.errors import ParityError
from video_opd.types import EncodedPrompt


def start_vllm(model: str, config: RolloutConfig | TeacherConfig, seed: int, **options: Any):
    """A vLLM engine inside this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    if not config.num_gpus:
        _register_architecture(model)

    memory: dict[str, Any] = {"kv_cache_memory_bytes": config.kv_cache_bytes} if config.kv_cache_bytes else {}
    if config.num_gpus:
        memory["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:  # a seeded request whose prefill is cut in two fails on a CPU: its generator cannot be rewound
        memory["enable_chunked_prefill"] = False
    return LLM(
        model,
        dtype=config.dtype,
        seed=seed,
        max_model_len=config.max_model_len,
        limit_mm_per_prompt={"video": 1, "image": 0},
        skip_mm_profiling=True,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
        **memory,
        **options,
    )


def _register_architecture(model: str) -> None:
    """Imports the model's class here rather than in vLLM's own subprocess, which knows nothing of cpu_torch."""
    from vllm import ModelRegistry

    (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def vllm_prompt(encoded: EncodedPrompt, response: np.ndarray | None = None) -> dict[str, Any]:
    """vLLM's input: UNEXPANDED prompt ids (it expands the video pad itself), the response, and the frames."""
    ids = encoded.unexpanded_token_ids + ([] if response is None else response.tolist())
    video = (encoded.frames.copy(), encoded.video_metadata)  # vLLM warns of read-only arrays
    return {"prompt_token_ids": ids, "multi_modal_data": {"video": [video]}}


def check_expansion(encoded: EncodedPrompt, seen: list[int], party: str) -> None:
    """Stops the run unless vLLM expanded the prompt into the same ids as transformers did."""
    expected = encoded.token_ids
    if len(seen) != len(expected) or (np.asarray(seen) != expected).any():
        raise ParityError(
            f"prompt {encoded.prompt_id}: {party}'s vLLM expands it to {len(seen)} tokens {list(seen)[:40]}..., "
            f"the processor to {len(expected)} tokens {expected[:40].tolist()}..."
        )
