"""THE prompt encoding: rollout, scoring and learning all see a prompt through PromptEncoder, and parse through parse_span."""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import ClipError, ModelError, ParityError
from video_opd.logs import log
from video_opd.types import Clip, EncodedPrompt, FailedPrompt, Prompt, Span, Trajectory
from video_opd.video.frame_cache import FrameCache

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


def video_metadata(clip: Clip) -> dict[str, Any]:
    """What transformers' and vLLM's processors take beside the frames. They compute times from it:

    Qwen3-VL writes, before each pair of frames, the mean of their frames_indices / fps, to one decimal. Here that is the mean
    of the pair's true times in the clip: of a variable rate or a cut, frames_indices are timestamps_s * fps, not whole numbers.
    Qwen2.5-VL takes the pairs as 2 * total_num_frames / (F * fps) seconds apart, from 0 on. That is duration_s shared out evenly:
    exact to a frame where frames are evenly spaced, else the mean.
    """
    indices = clip.frame_indices if clip.is_plain else clip.timestamps_s * clip.video_fps
    return {
        "total_num_frames": round(clip.duration_s * clip.video_fps),
        "fps": clip.video_fps,
        "frames_indices": indices.tolist(),
        "duration": clip.duration_s,
        "video_backend": "decord",  # whichever decoded: the processors behave the same
        "height": clip.frame_size[0],
        "width": clip.frame_size[1],
    }


def fingerprint(
    token_ids: np.ndarray,
    grid_thw: tuple[int, ...],
    frame_indices: np.ndarray,
    frames: np.ndarray,
    timing: Sequence[float] = (),
) -> str:
    """Identifies all that a model sees of a prompt: ids, video grid, which frames, their pixels, and their times.

    timing, where ids and frame indices do not tell the times: seconds between token grids (Qwen2.5-VL); timestamps and
    duration of a clip in seconds, where they are not those of the whole video at a constant rate.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(token_ids, dtype=np.int32).tobytes())
    digest.update(np.asarray(grid_thw, dtype=np.int64).tobytes())
    digest.update(np.asarray(frame_indices, dtype=np.int64).tobytes())
    digest.update(frames.tobytes())
    digest.update(np.asarray(timing, dtype=np.float64).tobytes())
    return digest.hexdigest()


class PromptEncoder:
    """Prompt -> EncodedPrompt with one model folder's processor. Every process that sees prompts holds one."""

    def __init__(
        self,
        model_path: str | Path,
        config: PromptConfig,
        video: VideoConfig,
        trust_remote_code: bool = False,
    ):
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self._config = config
        self.tokenizer = self._processor.tokenizer
        self.frame_cache = FrameCache(video)
        self._num_readers = video.decode_workers
        ids = {t: self.tokenizer.convert_tokens_to_ids(t) for t in ("<|video_pad|>", "<|image_pad|>")}
        if None in ids.values() or self.tokenizer.unk_token_id in ids.values():
            raise ModelError(
                f"the tokenizer of {model_path} has no <|video_pad|>: use a Qwen-VL model folder"
            )
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

    def encode_all(
        self, prompts: Sequence[Prompt], blank_video: bool = False
    ) -> list[EncodedPrompt | FailedPrompt]:
        """encode for each, in order; a FailedPrompt where the clip cannot be read. video.decode_workers clips are read at once."""

        def read(clip: Clip) -> np.ndarray | ClipError:
            try:
                return self.frame_cache.read(clip)
            except ClipError as error:
                log.info("clip %s: %s", clip.clip_id, error)
                return error

        with ThreadPoolExecutor(self._num_readers) as readers:
            clips = list(readers.map(read, [p.clip for p in prompts]))
        return [
            FailedPrompt(prompt_id=p.prompt_id, reason=str(c), kind=c.kind)
            if isinstance(c, ClipError)
            else self._encode(p, c, blank_video)
            for p, c in zip(prompts, clips, strict=True)
        ]

    def encode(self, prompt: Prompt, blank_video: bool = False) -> EncodedPrompt:
        """Reads the clip, expands the video into timestamps and pads, normalises the pixels. Raises ClipError.

        `blank_video` puts mid-grey frames in place of the clip's: what can be answered without seeing?
        """
        return self._encode(prompt, self.frame_cache.read(prompt.clip), blank_video)

    def _encode(self, prompt: Prompt, frames: np.ndarray, blank_video: bool) -> EncodedPrompt:
        clip = prompt.clip
        if blank_video:
            frames = np.full_like(frames, 128)
        text = self._text(prompt.query)
        metadata = video_metadata(clip)
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
        timing = [] if second_per_grid is None else [second_per_grid]
        timing += [] if clip.is_plain else [*clip.timestamps_s.tolist(), clip.duration_s]
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
            fingerprint=fingerprint(token_ids, grid, clip.frame_indices, frames, timing),
        )

    def encode_readable(
        self, prompts: Sequence[Prompt], blank_video: bool = False
    ) -> tuple[list[EncodedPrompt], dict[str, FailedPrompt]]:
        """The prompts whose clips can be read, and a FailedPrompt, by prompt id, for each of the others."""
        encoded = self.encode_all(prompts, blank_video)
        failed = {e.prompt_id: e for e in encoded if isinstance(e, FailedPrompt)}
        return [e for e in encoded if isinstance(e, EncodedPrompt)], failed


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
