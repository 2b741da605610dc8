"""Loads the student. Under ZeRO-3 a rank reads its share of each parameter, and never holds a whole model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from video_opd.config import Config
from video_opd.models.forward import VideoLLM, load_model

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors -> in torch


def load_student(config: Config, deepspeed_config: dict[str, Any]) -> VideoLLM:
    """The whole student on the CPU; under ZeRO-3 this rank's share of every parameter, on its device.

    transformers maps files into memory and reads nothing of them, unless it converts them to another dtype.
    So under ZeRO-3 it gets the files' own dtype: each share is read, and converted, when it is taken.
    """
    student, dtype = config.student, config.learner.dtype
    is_sharded = config.learner.zero_stage == 3
    loaded_dtype = (is_sharded and common_dtype(student)) or dtype
    model = load_model(student, loaded_dtype, config.trust_remote_code)
    if is_sharded:
        shard(model, getattr(torch, dtype), deepspeed_config)
    return model


def common_dtype(folder: str) -> str | None:
    """The dtype of all weights in a folder's safetensors files; None if they have several."""
    found = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(str(path), "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def shard(model: VideoLLM, dtype: torch.dtype, deepspeed_config: dict[str, Any]) -> None:
    """Replaces each parameter by this rank's share of it, as DeepSpeed keeps it; moves buffers to the device.

    deepspeed.initialize does so too, but only after it has put the whole model on each rank's device. Its
    context for building models, zero.Init, is not used: it would create buffers in `dtype` as well.
    """
    import deepspeed

    nothing = torch.nn.Module()  # with a module, Init has its linear layers let go of gathered weights
    init: Any = deepspeed.zero.Init(module=nothing, config_dict_or_path=deepspeed_config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # copies the share alone: what is mapped and not copied is never read
    model.to(init.local_device)
    for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        part.dtype = dtype
