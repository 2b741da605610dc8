"""The one prompt encoding of rollout, scoring and learning."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from video_opd.answers import opened_thought
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import ClipError, ModelError, ParityError
from video_opd.logs import log
from video_opd.models.feed import Ahead, Feed
from video_opd.types import Clip, EncodedPrompt, FailedPrompt, Prompt, Span, Trajectory
from video_opd.video.frame_cache import FrameCache

Encoded = EncodedPrompt | FailedPrompt
T = TypeVar("T")
VIDEO_PAD = "<|video_pad|>"  # stands for the video in a text


def chat_messages(config: PromptConfig, query: str) -> list[dict[str, Any]]:
    """What a chat template takes."""
    text = {"type": "text", "text": config.template.format(query=query)}
    content = [{"type": "video"}, text] if config.video_first else [text, {"type": "video"}]
    return [{"role": "user", "content": content}]


def video_metadata(clip: Clip) -> dict[str, Any]:
    """What the processors of transformers and vLLM take beside the frames. They compute times from it.

    Qwen3-VL writes the mean of frames_indices / fps, to one decimal, before each pair of frames. For a
    variable rate or a cut, frames_indices are timestamps_s * fps, so that this is the pair's true time.
    Qwen2.5-VL places pairs 2 * total_num_frames / (F * fps) seconds apart, from 0 on.
    """
    indices = clip.frame_indices if clip.is_plain else clip.timestamps_s * clip.video_fps
    return {
        "total_num_frames": round(clip.duration_s * clip.video_fps),
        "fps": clip.video_fps,
        "frames_indices": indices.tolist(),
        "duration": clip.duration_s,
        "video_backend": "decord",  # whatever the decoder: the processors behave the same
        "height": clip.frame_size[0],
        "width": clip.frame_size[1],
    }


def _num_frame_bytes(prompt: Prompt) -> int:
    height, width = prompt.clip.frame_size
    return len(prompt.clip.frame_indices) * height * width * 3


def fingerprint(
    token_ids: np.ndarray,
    grid_thw: Sequence[int],
    frame_indices: np.ndarray,
    frames: np.ndarray,
    timing: Sequence[float] = (),
) -> str:
    """Identifies all that a model sees of a prompt: ids, video grid, frame indices, pixels and times.

    timing, in seconds: between token grids (Qwen2.5-VL); timestamps and duration of a clip that is not plain.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = ((token_ids, np.int32), (grid_thw, np.int64), (frame_indices, np.int64), (frames, np.uint8))
    for values, dtype in (*parts, (timing, np.float64)):
        digest.update(np.asarray(values, dtype=dtype).tobytes())
    return digest.hexdigest()


class PromptEncoder:
    """Prompt -> EncodedPrompt, with a model folder's processor. Every process that sees prompts holds one."""

    def __init__(
        self, model: str | Path, config: PromptConfig, video: VideoConfig, trust_remote_code: bool = False
    ):
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        self._config = config
        self.tokenizer = self._processor.tokenizer
        self.frame_cache = FrameCache(video)
        self._one_at_a_time = threading.Lock()
        self._feed = Feed[Prompt](video.decode_workers, video.feed_bytes, _num_frame_bytes)
        asked = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
        asked = self._processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        self._thought = opened_thought(asked)
        to_id = self.tokenizer.convert_tokens_to_ids
        self.pad_ids = to_id(VIDEO_PAD), to_id("<|image_pad|>")  # never sampled or part of a response
        if None in self.pad_ids or self.tokenizer.unk_token_id in self.pad_ids:
            why = f"the tokenizer of {model} has no <|video_pad|>"
            raise ModelError(f"{why}: use a Qwen-VL model folder")

    def answer_ids(self, span: Span) -> np.ndarray:
        """int32[N]: an interval written by prompt.answer_template, with the end token."""
        text = self._config.answer_template.format(start=span[0], end=span[1]) + self.tokenizer.eos_token
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def written(self, response: str) -> str:
        """The response with the tag of the thought that its prompt, and not the response, has opened."""
        return self._thought + response

    def encode_all(self, prompts: Sequence[Prompt], blank_video: bool = False) -> list[Encoded]:
        """encode for each, in order, or a FailedPrompt. video.decode_workers clips are read at once."""
        return list(self.encode_ahead(prompts, blank_video))

    def encode_ahead(self, prompts: Sequence[Prompt], blank_video: bool = False) -> Iterator[Encoded]:
        """The same, while the caller works on earlier ones, video.feed_bytes of frames ahead of it."""
        return self.prepare_ahead(prompts, lambda encoded: encoded, blank_video)

    def prepare_ahead(
        self,
        prompts: Sequence[Prompt],
        prepare: Callable[[EncodedPrompt], T],
        blank_video: bool = False,
        on_ready: Callable[[], None] = lambda: None,
    ) -> Ahead[Prompt, T | FailedPrompt]:
        """encode_ahead, with `prepare` of each encoded prompt in the feed's threads; see Feed.ahead."""

        def encode(prompt: Prompt) -> T | FailedPrompt:
            try:
                return prepare(self.encode(prompt, blank_video))
            except ClipError as error:
                log.info("clip %s: %s", prompt.clip.clip_id, error)
                return FailedPrompt(prompt_id=prompt.prompt_id, reason=str(error), kind=error.kind)

        return self._feed.ahead(encode, prompts, on_ready)

    def encode(
        self, prompt: Prompt, blank_video: bool = False, frames: np.ndarray | None = None
    ) -> EncodedPrompt:
        """Expands the video into timestamps and pads, and normalises pixels. Raises ClipError.

        `blank_video` replaces the frames by mid-grey ones, to test what can be answered without seeing.
        `frames`: the clip's, if already read.
        """
        clip = prompt.clip
        frames = self.frame_cache.read(clip) if frames is None else frames
        if blank_video:
            frames = np.full_like(frames, 128)
        messages = chat_messages(self._config, prompt.query)
        metadata = video_metadata(clip)
        with self._one_at_a_time:  # tokenizers of transformers are not thread-safe
            text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            unexpanded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            inputs = self._processor(
                text=[text],
                videos=[frames.copy()],  # the cached frames are read-only
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="np",
            )
        time, rows, columns = grid = tuple(int(n) for n in inputs["video_grid_thw"][0])
        patch = self._processor.video_processor.patch_size
        if (rows * patch, columns * patch) != clip.frame_size:
            resized = f"the processor resizes {clip.frame_size} frames to {grid[1:]} patches of {patch}"
            raise ModelError(
                f"clip {clip.clip_id}: {resized}: bring video.max_video_tokens within its limits"
            )
        token_ids = np.asarray(inputs["input_ids"][0], dtype=np.int32)
        second_per_grid = float(inputs["second_per_grid_ts"][0]) if "second_per_grid_ts" in inputs else None
        timing = [] if second_per_grid is None else [second_per_grid]
        timing += [] if clip.is_plain else [*clip.timestamps_s.tolist(), clip.duration_s]
        return EncodedPrompt(
            prompt_id=prompt.prompt_id,
            token_ids=token_ids,
            unexpanded_token_ids=unexpanded,
            frames=frames,
            video_metadata=metadata | {"do_sample_frames": False},
            pixel_values=np.asarray(inputs["pixel_values_videos"], dtype=np.float32),
            video_grid_thw=(time, rows, columns),
            token_types=np.asarray(inputs["mm_token_type_ids"][0], dtype=np.int32),
            second_per_grid=second_per_grid,
            fingerprint=fingerprint(token_ids, grid, clip.frame_indices, frames, timing),
        )

    def encode_readable(
        self, prompts: Sequence[Prompt], blank_video: bool = False
    ) -> tuple[list[EncodedPrompt], dict[str, FailedPrompt]]:
        """The prompts whose clips can be read, and by prompt id a FailedPrompt for each other."""
        encoded = self.encode_all(prompts, blank_video)
        failed = {e.prompt_id: e for e in encoded if isinstance(e, FailedPrompt)}
        return [e for e in encoded if isinstance(e, EncodedPrompt)], failed


def check_parity(encoded: EncodedPrompt, trajectory: Trajectory, party: str) -> None:
    """Raises ParityError unless `party` sees the prompt as the trajectory's actor, if any, did."""
    if trajectory.prompt_fingerprint in (None, encoded.fingerprint):
        return
    ours = f"{party} sees {encoded.fingerprint} (grid {encoded.video_grid_thw})"
    theirs = f"the actor saw {trajectory.prompt_fingerprint}"
    where = first_difference(encoded.token_ids, trajectory.prompt_token_ids)
    where = where or "the token ids agree, so frames or grid differ"
    raise ParityError(f"prompt {encoded.prompt_id}: {ours}, {theirs}: {where}")


def first_difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Where two prompts' token ids, int32[M], differ; "" if nowhere."""
    if len(ours) != len(theirs):
        return f"{len(ours)} token ids here, {len(theirs)} there"
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((f"token {i} is {a} here, {b} there" for i, (a, b) in pairs if a != b), "")
