"""Writes the student as a transformers folder, file by file, as its parameters come."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from learner.adapters import merged_parameters
from video_opd.models.forward import VideoLLM, without_settings
from video_opd.weights.buckets import Named

FILE_BYTES = 2 << 30  # of one file, and of rank 0's host memory while it is collected


def write_student(model: VideoLLM, parameters: Named, source: str, folder: Path) -> None:
    """New weights, in files of at most FILE_BYTES or one parameter; other files as they are in `source`.

    parameters: those of the plain model, on the CPU, in the order of merged_parameters(model).
    """
    with without_settings(model):  # transformers refuses to write some that are published
        model.save_pretrained(folder, state_dict={})  # config.json and generation_config.json
    layout = split_torch_state_dict_into_shards(
        {name: _empty(parts[0]) for name, parts, _ in merged_parameters(model)},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=FILE_BYTES,
    )
    waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    weight_map = {}
    for name, tensor in parameters:
        file = layout.tensor_to_filename[name]
        waiting[file][name] = tensor.contiguous()
        if len(waiting[file]) == len(layout.filename_to_tensors[file]):
            tensors = revert_weight_conversion(model, waiting.pop(file))  # the names that `source` has
            save_file(tensors, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    assert not waiting, f"parameters of {list(waiting)} did not come"
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    others = shutil.ignore_patterns("*.safetensors*", "*.bin*", "config.json")
    shutil.copytree(source, folder, ignore=others, dirs_exist_ok=True)


def _empty(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Its shape and dtype without data. ZeRO-3 keeps the whole shape in ds_shape."""
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
