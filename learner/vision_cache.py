"""Caches a frozen vision tower's features of a clip: they are the same in every epoch, rollout and step."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from video_opd.models.forward import VideoLLM
from video_opd.models.patches import pixel_values
from video_opd.types import EncodedPrompt


class VisionCache:
    """Features of the clips used last, on the CPU, at most `max_bytes`; always at least one clip."""

    def __init__(self, model: VideoLLM, max_bytes: int):
        self._model, self._max_bytes, self._bytes = model, max_bytes, 0
        self._features: OrderedDict[str, list[torch.Tensor]] = OrderedDict()
        self._asked = self._computed = 0

    @torch.no_grad()
    def features(
        self, prompts: Sequence[EncodedPrompt], grids: torch.Tensor
    ) -> BaseModelOutputWithDeepstackFeatures:
        """The tower's output for the videos of B prompts, as the model's forward takes it in place of pixels.

        grids: int64[B, 3], on the model's device.
        """
        keys = [p.frames_digest for p in prompts]
        unknown = {key: i for i, key in enumerate(keys) if key not in self._features}
        self._asked += len(keys)
        self._computed += len(unknown)
        known = {key: self._features[key] for key in keys if key in self._features}
        if unknown:
            chosen = list(unknown.values())
            pixels = pixel_values([prompts[i] for i in chosen], grids.device)
            output = self._model.model.get_video_features(pixels, grids[chosen])
            outputs = (output.pooler_output, *getattr(output, "deepstack_features", ()))
            for i, key in enumerate(unknown):
                known[key] = [of_layer[i] for of_layer in outputs]
                self._features[key] = [tensor.cpu() for tensor in known[key]]
                self._bytes += sum(t.nbytes for t in known[key])
            while self._bytes > self._max_bytes and len(self._features) > 1:
                self._bytes -= sum(t.nbytes for t in self._features.popitem(last=False)[1])
        for key in keys:
            if key in self._features:
                self._features.move_to_end(key)
        first, *layers = zip(*([t.to(grids.device) for t in known[key]] for key in keys), strict=True)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=layers)  # pyright: ignore

    def take_metrics(self) -> dict[str, float]:
        """The share of videos since the last time that did not go through the tower."""
        share = 1.0 - self._computed / self._asked
        self._asked = self._computed = 0
        return {"learner/vision_cache_hit_frac": share}
