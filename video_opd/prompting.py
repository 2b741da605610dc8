"""THE prompt encoding: rollout, scoring and learning all see a prompt through PromptEncoder, and parse through parse_span."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from video_opd.clips import FrameCache
from video_opd.config import PromptConfig
from video_opd.errors import ClipError, ModelError, ParityError
from video_opd.types import EncodedPrompt, FailedPrompt, Prompt, Span, Trajectory

_NUMBER = r"(\d++(?:\.\d++)?+)"
_SPAN = re.compile(  # from the start of a run of digits, and without going back: linear in the length of any answer
    rf"(?<!\d){_NUMBER}\s*+(?:s(?:ec(?:onds?+)?+)?+\s*+)?+(?:to|and|-|–|—|,)\s*+{_NUMBER}"
)


def parse_span(text: str) -> Span | None:
    """The first pair of numbers joined by 'to', 'and', a dash or a comma, in seconds; None if there is none.

    Where the text has an <answer> tag, only what follows the last one counts: times that are thought of before are no
    answer. A reversed pair is returned as written: it is an answer, and its IoU is 0.
    """
    match = _SPAN.search(text, max(text.rfind("<answer>"), 0))
    return (float(match[1]), float(match[2])) if match else None


def fingerprint(
    token_ids: np.ndarray,
    grid_thw: tuple[int, ...],
    frame_indices: np.ndarray,
    frames: np.ndarray,
    second_per_grid: float | None = None,
) -> str:
    """Identifies all that a model sees of a prompt: ids, video grid, which frames, their pixels, and their clock."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(token_ids, dtype=np.int32).tobytes())
    digest.update(np.asarray(grid_thw, dtype=np.int64).tobytes())
    digest.update(np.asarray(frame_indices, dtype=np.int64).tobytes())
    digest.update(frames.tobytes())
    if second_per_grid is not None:
        digest.update(np.float64(second_per_grid).tobytes())
    return digest.hexdigest()


class PromptEncoder:
    """Prompt -> EncodedPrompt with one model folder's processor. Every process that sees prompts holds one."""

    def __init__(self, model_path: str | Path, config: PromptConfig):
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model_path)
        self._config = config
        self.tokenizer = self._processor.tokenizer
        self.frame_cache = FrameCache(config.frame_cache_bytes)
        ids = {t: self.tokenizer.convert_tokens_to_ids(t) for t in ("<|video_pad|>", "<|image_pad|>")}
        if None in ids.values() or self.tokenizer.unk_token_id in ids.values():
            raise ModelError(f"the tokenizer of {model_path} has no <|video_pad|>: use a Qwen-VL model folder")
        self.pad_ids = tuple(ids.values())  # never sampled, never part of a response
        self._video_id = ids["<|video_pad|>"]

    def _text(self, query: str) -> str:
        text = {"type": "text", "text": self._config.template.format(query=query)}
        content = [{"type": "video"}, text] if self._config.video_first else [text, {"type": "video"}]
        messages = [{"role": "user", "content": content}]
        return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def answer_ids(self, span: Span) -> np.ndarray:
        """int32[N]: an interval written as prompt.answer_template says, end token included."""
        text = self._config.answer_template.format(start=span[0], end=span[1]) + self.tokenizer.eos_token
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def encode(self, prompt: Prompt, blank_video: bool = False) -> EncodedPrompt:
        """Reads the clip, expands the video into timestamps and pads, normalises the pixels. Raises ClipError.

        `blank_video` puts mid-grey frames in place of the clip's: what can be answered without seeing?
        """
        clip = prompt.clip
        frames = self.frame_cache.read(clip)
        if blank_video:
            frames = np.full_like(frames, 128)
        text = self._text(prompt.query)
        metadata = {
            "total_num_frames": clip.num_video_frames,
            "fps": clip.video_fps,
            "frames_indices": clip.frame_indices.tolist(),
            "duration": clip.duration_s,
            "video_backend": "decord",
            "height": clip.frame_size[0],
            "width": clip.frame_size[1],
        }
        inputs = self._processor(
            text=[text],
            videos=[frames.copy()],  # the cached frames are read-only
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="np",
        )
        time, rows, columns = (int(n) for n in inputs["video_grid_thw"][0])
        grid = (time, rows, columns)
        patch = self._processor.video_processor.patch_size
        if (rows * patch, columns * patch) != clip.frame_size:
            raise ModelError(
                f"clip {clip.clip_id}: the processor resizes {clip.frame_size} frames to {grid[1:]} patches of {patch}: "
                "bring video.max_video_tokens within the processor's own limits"
            )
        token_ids = np.asarray(inputs["input_ids"][0], dtype=np.int32)
        second_per_grid = float(inputs["second_per_grid_ts"][0]) if "second_per_grid_ts" in inputs else None
        return EncodedPrompt(
            prompt_id=prompt.prompt_id,
            token_ids=token_ids,
            unexpanded_token_ids=self.tokenizer(text, add_special_tokens=False)["input_ids"],
            frames=frames,
            video_metadata=metadata | {"do_sample_frames": False},
            pixel_values=np.asarray(inputs["pixel_values_videos"], dtype=np.float32),
            video_grid_thw=grid,
            token_types=np.asarray(inputs["mm_token_type_ids"][0], dtype=np.int32),
            second_per_grid=second_per_grid,
            fingerprint=fingerprint(token_ids, grid, clip.frame_indices, frames, second_per_grid),
        )

    def encode_readable(
        self, prompts: Sequence[Prompt], blank_video: bool = False
    ) -> tuple[list[EncodedPrompt], dict[str, FailedPrompt]]:
        """The prompts whose clips can be read, and a FailedPrompt, by prompt id, for each of the others."""
        encoded, failed = [], {}
        for prompt in prompts:
            try:
                encoded.append(self.encode(prompt, blank_video))
            except ClipError as error:
                failed[prompt.prompt_id] = FailedPrompt(prompt_id=prompt.prompt_id, reason=str(error))
        return encoded, failed


def check_parity(encoded: EncodedPrompt, trajectory: Trajectory, party: str) -> None:
    """Stops the run unless `party` sees the prompt exactly as the actor that sampled the trajectory, if any, saw it."""
    if trajectory.prompt_fingerprint in (None, encoded.fingerprint):
        return
    ours, theirs = encoded.token_ids, trajectory.prompt_token_ids
    where = "the token ids agree, so frames or grid differ"
    if len(ours) != len(theirs):
        where = f"{len(ours)} token ids here, {len(theirs)} there"
    elif (ours != theirs).any():
        i = int(np.argmax(ours != theirs))
        where = f"token {i} is {ours[i]} here, {theirs[i]} there"
    raise ParityError(
        f"prompt {encoded.prompt_id}: {party} sees {encoded.fingerprint} (grid {encoded.video_grid_thw}), "
        f"the actor saw {trajectory.prompt_fingerprint}: {where}"
    )
