"""The vLLM engine of a rollout actor."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from video_opd.config import Config
from video_opd.models.vllm_engine import SamplingEngine
from video_opd.weights.adapters import vllm_options, write_adapter
from video_opd.weights.buckets import WeightBucket, check_whole, unpack


class PolicyEngine(SamplingEngine):
    """Samples from the student with vLLM; its weights can be replaced between generations."""

    def __init__(self, config: Config, banned_ids: Sequence[int]):
        from video_opd.weights.transfer import BACKENDS, WORKER  # registers the object store's with vLLM

        self._student, self._learner = config.student, config.learner
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if self._learner.publishes_adapters:
            options |= vllm_options(self._learner)
        else:
            options["worker_extension_cls"] = WORKER
            options["weight_transfer_config"] = {"backend": BACKENDS[config.weight_transfer]}
        how = config.rollout, config.seed, banned_ids, config.loss.student_top_k
        super().__init__(config.student, *how, **options)
        self._is_updating = False

    def load_weights(self, policy_version: int, buckets: Sequence[WeightBucket]) -> None:
        """Loads one version. Raises WeightsLostError, before any change, unless it is whole."""
        check_whole(buckets, policy_version)
        if self._learner.publishes_adapters:
            self._load_adapter(policy_version, buckets)
            return
        self.start_weight_update()
        for bucket in buckets:  # vLLM copies a call's arguments to the processes of tensor_parallel
            self.update_weights({"update_info": {"buckets": [bucket]}})
        self.finish_weight_update()

    def _load_adapter(self, policy_version: int, buckets: Sequence[WeightBucket]) -> None:
        """Puts the version's adapter in place of the one before. vLLM reads it from a folder and keeps it."""
        from vllm.lora.request import LoRARequest

        with TemporaryDirectory() as folder:
            write_adapter(Path(folder), dict(unpack(buckets)), self._learner, self._student)
            self._adapter = LoRARequest(f"version {policy_version}", 1, folder, load_inplace=True)
            assert self._llm.llm_engine.add_lora(self._adapter), "vLLM kept another adapter"
        self._adapter.load_inplace = False  # in requests it means: read the folder again
        self._drop_computed()

    def init_weight_transfer_engine(self, request: Any) -> None:
        self._llm.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        """Also ends an update that never came because another actor died: vLLM would refuse a second one."""
        if self._is_updating:
            self._llm.finish_weight_update()
        self._llm.start_weight_update()
        self._is_updating = True

    def update_weights(self, request: Any) -> None:
        self._is_updating = False  # vLLM itself ends an update that fails here
        self._llm.update_weights(request)
        self._is_updating = True

    def finish_weight_update(self) -> None:
        """Drops all that was computed with the old weights, too."""
        self._llm.finish_weight_update()
        self._is_updating = False
        self._drop_computed()

    def _drop_computed(self) -> None:
        assert self._llm.reset_prefix_cache(), "blocks of the prefix cache are still in use"
        self._llm.llm_engine.reset_encoder_cache()
