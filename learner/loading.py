"""Loads the student. Under ZeRO-3 a rank reads its share of each parameter, and never holds a whole model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from learner.deepspeed_config import deepspeed_config
from video_opd.config import Config
from video_opd.config_learner import LearnerConfig
from video_opd.models.forward import VideoLLM, load_model

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors -> in torch


def load_student(config: Config) -> VideoLLM:
    """The whole student on the CPU; under ZeRO-3 this rank's share of every parameter, on its device.

    transformers maps files into memory and reads nothing of them, unless it converts them to another dtype.
    So under ZeRO-3 it gets the files' own dtype: each share is read, and converted, when it is taken.
    """
    learner, is_sharded = config.learner, config.learner.zero_stage == 3
    dtype = (is_sharded and common_dtype(config.student)) or learner.dtype
    model = load_model(config.student, dtype, config.trust_remote_code, learner.attn_implementation)
    if is_sharded:
        shard(model, learner)
    return model


def common_dtype(folder: str) -> str | None:
    """The dtype of all weights in a folder's safetensors files; None if they have several."""
    found = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(str(path), "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def shard(model: VideoLLM, learner: LearnerConfig) -> None:
    """Replaces each parameter by this rank's share of it, as DeepSpeed keeps it; moves buffers to the device.

    deepspeed.initialize does so too, but only after it has put the whole model on each rank's device. Its
    context for building models, zero.Init, is not entered: it would create buffers in the same dtype.
    """
    import deepspeed

    dtype, nothing = getattr(torch, learner.dtype), torch.nn.Module()
    # with a module, Init also makes linear layers let go of gathered weights
    init: Any = deepspeed.zero.Init(module=nothing, config_dict_or_path=deepspeed_config(learner))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # copies the share alone: what is mapped and not copied is never read
    model.to(init.local_device)
    for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        part.dtype = dtype
