"""The vLLM engine of a rollout actor."""

from collections.abc import Sequence

from video_opd.config import RolloutConfig
from video_opd.errors import WeightsLostError
from video_opd.models.vllm_engine import SamplingEngine
from video_opd.types import GroupPlace, WeightBucket


class PolicyEngine(SamplingEngine):
    """Samples from the student with vLLM; its weights can be replaced between calls."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        seed: int,
        banned_ids: Sequence[int],
        trust_remote_code: bool = False,
    ):
        receiver = "actors.weight_receiver.WeightReceiver"
        super().__init__(
            model,
            config,
            seed,
            banned_ids,
            trust_remote_code=trust_remote_code,
            worker_extension_cls=receiver,
        )

    def load_weights(self, policy_version: int, buckets: list[WeightBucket]) -> None:
        """Swaps the weights and drops all that was computed with the old ones. No generation may be under way.

        Raises WeightsLostError unless the buckets are the whole version; nothing may be sampled before another one is.
        """
        self._replace_weights("receive_buckets", policy_version, buckets)

    def receive_weights(self, policy_version: int, place: GroupPlace | None, timeout_s: float) -> None:
        """The same with weights that the learner broadcasts, see WeightReceiver.receive_broadcast."""
        self._replace_weights("receive_broadcast", policy_version, place, timeout_s)

    def _replace_weights(self, method: str, *arguments) -> None:
        failures = self._llm.collective_rpc(method, args=arguments)
        assert self._llm.reset_prefix_cache(), "blocks of the prefix cache are still in use"
        self._llm.llm_engine.reset_encoder_cache()
        if failure := next(filter(None, failures), None):
            raise WeightsLostError(failure)
