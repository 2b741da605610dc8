"""The learner's engine around a student whose layers sleep. Its head is real, so gradients flow."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.emulated_engines import UPDATE
from learner import engine
from video_opd.models.forward import ResponseBatch, ResponseLoss
from video_opd.types import EncodedPrompt


class SleepyLoss(ResponseLoss):
    """Both passes of a row sleep, together UPDATE; the states of all tokens are zeros."""

    def hidden(self, batch: ResponseBatch) -> torch.Tensor:
        time.sleep(float(os.environ[UPDATE]) * len(batch.lengths))
        return self.model.lm_head.weight.new_zeros(len(batch.targets), self.model.lm_head.in_features)


def _collate(
    prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray], pad_id: int, device: Any = "cpu"
) -> ResponseBatch:
    """What the loss needs; a GPU would make the rest."""
    nothing = torch.empty(0)
    unseen = dict.fromkeys(
        ("input_ids", "attention_mask", "token_types", "pixel_values", "video_grid_thw", "rows"), nothing
    )
    targets = torch.from_numpy(np.concatenate(responses).astype(np.int64))
    return ResponseBatch(**unseen, targets=targets, lengths=tuple(len(r) for r in responses))


def emulate_passes() -> None:
    """Of the learner's engines that this process makes from now on."""
    replaced: Any = engine
    replaced.ResponseLoss, replaced.collate = SleepyLoss, _collate
