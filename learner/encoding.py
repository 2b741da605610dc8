"""The rows of an update with their encoded prompts: read and encoded while earlier ones are trained on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from learner.batching import Row
from video_opd.models.prompting import GREY, PromptEncoder, check_parity
from video_opd.types import EncodedPrompt, FailedPrompt


class EncodedRows(NamedTuple):
    """A micro-batch. A row whose clip cannot be read is dropped: it gets weight 0 and grey frames."""

    rows: list[Row]
    prompts: list[EncodedPrompt]  # of each row
    failed: list[FailedPrompt]  # one for each dropped row that had a weight


def encoded_rows(encoder: PromptEncoder, micro_batches: Sequence[Sequence[Row]]) -> Iterator[EncodedRows]:
    """Yields each micro-batch. A prompt is encoded once, when its first row needs it, and kept for its last.

    While a caller works, video.feed_bytes of frames are read ahead of it. Raises ParityError.
    """
    last = {row.prompt.prompt_id: i for i, rows in enumerate(micro_batches) for row in rows}
    prompts = {row.prompt.prompt_id: row.prompt for rows in micro_batches for row in rows}
    ahead = zip(prompts, encoder.encode_ahead(list(prompts.values())), strict=True)
    encoded: dict[str, EncodedPrompt | FailedPrompt] = {}
    for i, rows in enumerate(micro_batches):
        while any(row.prompt.prompt_id not in encoded for row in rows):
            encoded.update([next(ahead)])
        yield _micro_batch(encoder, rows, encoded)
        for prompt_id in [p for p in encoded if last[p] == i]:
            del encoded[prompt_id]


def _micro_batch(
    encoder: PromptEncoder, rows: Sequence[Row], encoded: Mapping[str, EncodedPrompt | FailedPrompt]
) -> EncodedRows:
    """Grey frames stand in for those that cannot be read, so that every rank makes the same passes."""
    batch = EncodedRows([], [], [])
    for row in rows:
        prompt = encoded[row.prompt.prompt_id]
        if isinstance(prompt, FailedPrompt):
            batch.failed.extend([prompt] if row.weight else [])
            clip, row = row.prompt.clip, replace(row, weight=0.0)
            grey = np.full((len(clip.frame_indices), *clip.frame_size, 3), GREY, np.uint8)
            prompt = encoder.encode(row.prompt, frames=grey)
        else:
            check_parity(prompt, row.trajectory, "the learner")
        batch.rows.append(row)
        batch.prompts.append(prompt)
    return batch
