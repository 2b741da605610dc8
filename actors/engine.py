"""The vLLM engine of a rollout actor."""

from collections.abc import Sequence

from video_opd.config import RolloutConfig
from video_opd.types import WeightBucket
from video_opd.vllm_engine import SamplingEngine


class PolicyEngine(SamplingEngine):
    """Samples from the student with vLLM; its weights can be replaced between calls."""

    def __init__(self, model: str, config: RolloutConfig, seed: int, banned_ids: Sequence[int]):
        super().__init__(model, config, seed, banned_ids, worker_extension_cls="actors.weight_receiver.WeightReceiver")

    def load_weights(self, buckets: list[WeightBucket]) -> None:
        """Swaps the weights and drops all that was computed with the old ones. No generation may be under way."""
        self._llm.collective_rpc("receive_weights", args=(buckets,))
        assert self._llm.reset_prefix_cache(), "blocks of the prefix cache are still in use"
        self._llm.llm_engine.reset_encoder_cache()
