"""Keeps a frozen vision tower's features of clips: they are the same in every pass, rollout and step."""

from collections import OrderedDict
from collections.abc import Container, Sequence

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from video_opd.config_learner import LearnerConfig
from video_opd.models.forward import VideoLLM
from video_opd.models.patches import pixel_values
from video_opd.types import EncodedPrompt


class VisionCache:
    """Features of clips that later passes need, on the device, and of those used last, on the CPU."""

    def __init__(self, model: VideoLLM, max_bytes: int):
        """max_bytes: of the features that no later pass of a step is known to need."""
        self._model, self._max_bytes = model, max_bytes
        self._features: OrderedDict[str, list[torch.Tensor]] = OrderedDict()  # least recently used first
        self._asked = self._computed = 0

    @torch.no_grad()
    def features(
        self, prompts: Sequence[EncodedPrompt], grids: torch.Tensor, needed: Container[str] = ()
    ) -> BaseModelOutputWithDeepstackFeatures:
        """The tower's output for the videos of B prompts, as the model's forward takes it in place of pixels.

        grids: int64[B, 3], on the model's device. needed: digests of frames that later passes ask for.
        """
        keys = [p.frames_digest for p in prompts]
        unknown = {key: i for i, key in enumerate(keys) if key not in self._features}
        self._asked += len(keys)
        self._computed += len(unknown)
        known = {key: self._features.pop(key) for key in dict.fromkeys(keys) if key in self._features}
        if unknown:
            chosen = list(unknown.values())
            pixels = pixel_values([prompts[i] for i in chosen], grids.device)
            output = self._model.model.get_video_features(pixels, grids[chosen])
            outputs = (output.pooler_output, *getattr(output, "deepstack_features", ()))
            known |= {key: [of_layer[i] for of_layer in outputs] for i, key in enumerate(unknown)}
        for key, of_clip in known.items():
            if key in needed:
                self._features[key] = of_clip
            elif self._max_bytes:
                self._features[key] = [tensor.cpu() for tensor in of_clip]
        self._forget(needed)
        first, *layers = zip(*([t.to(grids.device) for t in known[key]] for key in keys), strict=True)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=layers)  # pyright: ignore

    def _forget(self, needed: Container[str]) -> None:
        sizes = {key: sum(t.nbytes for t in of) for key, of in self._features.items() if key not in needed}
        num_bytes = sum(sizes.values())
        for key, size in sizes.items():
            if num_bytes <= self._max_bytes:
                return
            num_bytes -= size
            del self._features[key]

    @staticmethod
    def of(model: VideoLLM, learner: LearnerConfig) -> "VisionCache | None":
        """None where every pass runs the tower."""
        return VisionCache(model, learner.vision_cache_bytes) if learner.keeps_features else None

    def take_metrics(self) -> dict[str, float]:
        """The share of videos since the last time that did not go through the tower."""
        share = 1.0 - self._computed / self._asked
        self._asked = self._computed = 0
        return {"learner/vision_cache_hit_frac": share}
