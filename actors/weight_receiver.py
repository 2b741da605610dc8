"""Inside a vLLM worker: buckets of published weights -> the running model."""

from collections.abc import Iterator

import torch

from video_opd.types import WeightBucket


def unpack(buckets: list[WeightBucket]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of all buckets."""
    for bucket in buckets:
        dtype = getattr(torch, bucket.dtype)
        flat = torch.from_numpy(bucket.buffer.copy()).view(dtype)
        sizes = [torch.Size(shape).numel() for shape in bucket.shapes]
        for name, shape, part in zip(bucket.names, bucket.shapes, flat.split(sizes), strict=True):
            yield name, part.view(shape)


class WeightReceiver:
    """vLLM worker extension: its methods are targets of `collective_rpc`."""

    def receive_weights(self, buckets: list[WeightBucket]) -> None:
        """Replaces the model's weights. The caller resets vLLM's caches afterwards."""
        self.reload_weights(weights_iterator=unpack(buckets))  # type: ignore[attr-defined]  # vLLM's Worker
        self._repack_tied_head()

    def _repack_tied_head(self) -> None:
        """On a CPU vLLM multiplies by a packed copy of the head's weight. A head tied to the embedding has no weight
        of its own in a checkpoint, so reload_weights leaves its packed copy as it was."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
