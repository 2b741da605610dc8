"""Frames -> the patches that vision towers take, computed on the model's device from uint8."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from video_opd.errors import ModelError
from video_opd.types import EncodedPrompt, Patching


def patching_of(video_processor: Any) -> Patching:
    """What transformers' video processor of a Qwen-VL model does. Raises ModelError if it does less."""
    p = video_processor
    if not (p.do_rescale and p.do_normalize):
        raise ModelError("the model's video processor does not normalise pixels: use a Qwen-VL model folder")
    mean, std = (torch.tensor(values) * (1.0 / p.rescale_factor) for values in (p.image_mean, p.image_std))
    return Patching(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        patch_size=p.patch_size,
        merge_size=p.merge_size,
        temporal_patch_size=p.temporal_patch_size,
    )


def pixel_values(prompts: Sequence[EncodedPrompt], device: torch.device | str) -> torch.Tensor:
    """float32[patches of all videos, patch_dim]. Equal frames are uploaded and cut once."""
    patching, cut_of = prompts[0].patching, {}
    for prompt in prompts:
        assert prompt.patching == patching, "prompts of one model"
        if prompt.frames_digest not in cut_of:
            cut_of[prompt.frames_digest] = _cut(_upload(prompt.frames, device), patching)
    cut = [cut_of[p.frames_digest] for p in prompts]
    return _normalised(cut[0] if len(cut) == 1 else torch.cat(cut), patching)


def patches(frames: torch.Tensor, patching: Patching) -> torch.Tensor:
    """float32[patches, patch_dim] of uint8[F, H, W, 3], on its device: as transformers' video processors.

    Patches are in order of time, row and column of their video tokens; those of a token follow each other.
    """
    return _normalised(_cut(frames, patching), patching)


def _upload(frames: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """To a GPU from pinned memory, so that the caller does not wait."""
    on_gpu = torch.device(device).type == "cuda"
    host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=on_gpu)
    np.copyto(host.numpy(), frames)  # the frames themselves are read-only, which torch warns of
    return host.to(device, non_blocking=True)


def _cut(frames: torch.Tensor, patching: Patching) -> torch.Tensor:
    """uint8[patches, 3, pixels of a patch and channel]."""
    time, patch, merge = patching.temporal_patch_size, patching.patch_size, patching.merge_size
    num_frames, height, width, channels = frames.shape
    rows, columns = height // (merge * patch), width // (merge * patch)
    blocks = frames.view(num_frames // time, time, rows, merge, patch, columns, merge, patch, channels)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels, time * patch * patch)


def _normalised(cut: torch.Tensor, patching: Patching) -> torch.Tensor:
    """As rescale_and_normalize in transformers' image_processing_backends.py, operation by operation."""
    mean, std = (torch.tensor(values, device=cut.device)[:, None] for values in (patching.mean, patching.std))
    return cut.to(torch.float32).sub_(mean).div_(std).flatten(1)
