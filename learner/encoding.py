"""The rows of an update with their encoded prompts: read and encoded while earlier ones are trained on."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from learner.batching import Row
from video_opd.models.prompting import Encoded, PromptEncoder, check_parity, grey_frames
from video_opd.types import EncodedPrompt, FailedPrompt, Prompt
from video_opd.video.clips import frames_key

EncodedClip = dict[str, Encoded]
"""Prompts of one clip, by prompt_id."""


class EncodedRows(NamedTuple):
    """A micro-batch. A row whose clip cannot be read is dropped: it gets weight 0 and grey frames."""

    rows: list[Row]
    prompts: list[EncodedPrompt]  # of each row
    failed: list[FailedPrompt]  # one for each dropped row that had a weight
    kept: frozenset[str]  # digests of frames that later micro-batches need too


def encoded_rows(encoder: PromptEncoder, micro_batches: Sequence[Sequence[Row]]) -> Iterator[EncodedRows]:
    """Yields each micro-batch. A clip is read once, for all its prompts, and kept for the last of its rows.

    While a caller works, video.feed_bytes of frames are read ahead of it. Raises ParityError.
    """
    last = {frames_key(row.prompt.clip): i for i, rows in enumerate(micro_batches) for row in rows}
    clips: dict[Hashable, dict[str, Prompt]] = {}
    for row in (row for rows in micro_batches for row in rows):
        clips.setdefault(frames_key(row.prompt.clip), {})[row.prompt.prompt_id] = row.prompt
    ahead = zip(clips, _encoded_clips(encoder, [list(c.values()) for c in clips.values()]), strict=True)
    encoded: dict[Hashable, EncodedClip] = {}
    for i, rows in enumerate(micro_batches):
        while any(frames_key(row.prompt.clip) not in encoded for row in rows):
            encoded.update([next(ahead)])
        held = [encoded[key] for key in encoded if last[key] > i]
        kept = {p.frames_digest for clip in held for p in clip.values() if not isinstance(p, FailedPrompt)}
        yield _micro_batch(encoder, rows, encoded, frozenset(kept))
        for key in [key for key in encoded if last[key] == i]:
            del encoded[key]


def _encoded_clips(encoder: PromptEncoder, clips: Sequence[Sequence[Prompt]]) -> Iterator[EncodedClip]:
    """The prompts of each clip, encoded with the frames that the first of them has read."""
    others = {first.prompt_id: others for first, *others in clips}

    def encode(first: EncodedPrompt) -> list[EncodedPrompt]:
        seen = first.frames, first.frames_digest
        return [first, *(encoder.encode(p, False, *seen) for p in others[first.prompt_id])]

    ahead = encoder.prepare_ahead([first for first, *_ in clips], encode)
    for prompts, found in zip(clips, ahead, strict=True):
        if isinstance(found, FailedPrompt):
            found = [replace(found, prompt_id=p.prompt_id) for p in prompts]
        yield {p.prompt_id: p for p in found}


def _micro_batch(
    encoder: PromptEncoder,
    rows: Sequence[Row],
    encoded: Mapping[Hashable, EncodedClip],
    kept: frozenset[str],
) -> EncodedRows:
    """Grey frames stand in for those that cannot be read, so that every rank makes the same passes."""
    batch = EncodedRows([], [], [], kept)
    for row in rows:
        prompt = encoded[frames_key(row.prompt.clip)][row.prompt.prompt_id]
        if isinstance(prompt, FailedPrompt):
            batch.failed.extend([prompt] if row.weight else [])
            clip, row = row.prompt.clip, replace(row, weight=0.0)
            shape = len(clip.frame_indices), *clip.frame_size, 3
            prompt = encoder.encode(row.prompt, False, *grey_frames(shape))
        else:
            check_parity(prompt, row.trajectory, "the learner")
        batch.rows.append(row)
        batch.prompts.append(prompt)
    return batch
