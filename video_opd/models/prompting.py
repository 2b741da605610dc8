"""The one prompt encoding of rollout, scoring and learning."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from video_opd.answers import opened_thought, parse_spans
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import ClipError, DataError, ModelError, ParityError
from video_opd.logs import log
from video_opd.models.feed import Ahead, Feed
from video_opd.types import Clip, EncodedPrompt, FailedPrompt, Prompt, Span, Trajectory
from video_opd.video.frame_cache import FrameCache, digest_of

Encoded = EncodedPrompt | FailedPrompt
T = TypeVar("T")
VIDEO_PAD = "<|video_pad|>"  # stands for the video in a text
VIDEOS_KEPT = 512  # VideoTexts that an encoder remembers, 55 KiB each at 7,000 tokens
GREY = 128  # every pixel of a blank video
_PADS = re.compile(f"(?:{re.escape(VIDEO_PAD)})+")


def chat_messages(config: PromptConfig, query: str, style: str | None = None) -> list[dict[str, Any]]:
    """What a chat template takes. style: of the prompt, as in Prompt."""
    config = config.of_style(style)
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


class VideoText(NamedTuple):
    """What stands in a prompt in the place of its video's pad, V tokens, and what belongs to it."""

    token_ids: np.ndarray  # int32[V]
    token_types: np.ndarray  # int32[V]
    grid_thw: tuple[int, int, int]
    second_per_grid: float | None


def _num_frame_bytes(prompt: Prompt) -> int:
    height, width = prompt.clip.frame_size
    return len(prompt.clip.frame_indices) * height * width * 3


def fingerprint(
    token_ids: np.ndarray,
    grid_thw: Sequence[int],
    frame_indices: np.ndarray,
    frames_digest: str,
    timing: Sequence[float] = (),
) -> str:
    """Identifies all that a model sees of a prompt: ids, video grid, frame indices, pixels and times.

    timing, in seconds: between token grids (Qwen2.5-VL); timestamps and duration of a clip that is not plain.
    """
    digest = hashlib.blake2b(frames_digest.encode(), digest_size=16)
    parts = ((token_ids, np.int32), (grid_thw, np.int64), (frame_indices, np.int64), (timing, np.float64))
    for values, dtype in parts:
        digest.update(np.asarray(values, dtype=dtype).tobytes())
    return digest.hexdigest()


def grey_frames(shape: Sequence[int]) -> tuple[np.ndarray, str]:
    """uint8[F, H, W, 3] of a blank video, read-only, and their digest."""
    return np.broadcast_to(np.uint8(GREY), shape), f"grey {tuple(shape)}"


def without_video(prompt: EncodedPrompt) -> EncodedPrompt:
    """The same tokens at the same times with grey frames of the same size."""
    frames, digest = grey_frames(prompt.frames.shape)
    return replace(prompt, frames=frames, frames_digest=digest, fingerprint=f"{prompt.fingerprint} grey")


class PromptEncoder:
    """Prompt -> EncodedPrompt, with a model folder's processor. Every process that sees prompts holds one.

    No method computes with pixels: models/patches.py does, where the model is. Thread-safe.
    """

    def __init__(
        self, model: str | Path, config: PromptConfig, video: VideoConfig, trust_remote_code: bool = False
    ):
        from transformers import AutoProcessor

        from video_opd.models.patches import patching_of

        self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        self._config = config
        self.tokenizer = self._processor.tokenizer
        self.frame_cache = FrameCache(video)
        self._patching = patching_of(self._processor.video_processor)
        self._feed = Feed[Prompt](video.decode_workers, video.feed_bytes, _num_frame_bytes)
        self._video_text = lru_cache(VIDEOS_KEPT)(self._text_of_video)
        asked = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
        asked = self._processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        self._thought = opened_thought(asked)
        to_id = self.tokenizer.convert_tokens_to_ids
        self.pad_ids = to_id(VIDEO_PAD), to_id("<|image_pad|>")  # never sampled or part of a response
        if None in self.pad_ids or self.tokenizer.unk_token_id in self.pad_ids:
            why = f"the tokenizer of {model} has no <|video_pad|>"
            raise ModelError(f"{why}: use a Qwen-VL model folder")
        self._to_ids(asked)  # unsets truncation and padding; later calls change nothing, so threads may call

    def _to_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(self, spans: Sequence[Span], style: str | None = None) -> np.ndarray:
        """int32[N]: the ground truth as the answer_template of a prompt's style, with the end token."""
        text, _ = self._config.of_style(style).answer(spans)
        return np.asarray(self._to_ids(text + self.tokenizer.eos_token), dtype=np.int32)

    def written(self, response: str) -> str:
        """The response with the tag of the thought that its prompt, and not the response, has opened."""
        return self._thought + response

    def spans_in(self, text: str, style: str | None) -> tuple[Span, ...]:
        """The interval that a response, as `written`, names; all if prompts of the style ask for sets."""
        return parse_spans(text, self._config.of_style(style).asks_for_sets)

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
        self,
        prompt: Prompt,
        blank_video: bool = False,
        frames: np.ndarray | None = None,
        digest: str | None = None,
    ) -> EncodedPrompt:
        """Reads the clip and expands its place in the text into timestamps and pads. Raises ClipError.

        `blank_video` replaces the frames by mid-grey ones, to test what can be answered without seeing.
        `frames`: the clip's, if already read; `digest`: theirs, if known.
        """
        clip = prompt.clip
        if frames is None:
            frames, digest = self.frame_cache.read_with_digest(clip)
        digest = digest or digest_of(frames)
        if blank_video:
            frames, digest = grey_frames(frames.shape)
        metadata, unexpanded = video_metadata(clip), self._unexpanded(prompt)
        video = self._video_text(json.dumps(metadata))
        self._check_size(clip, video)
        token_ids, place = self._expanded(unexpanded, video), unexpanded.index(self.pad_ids[0])
        token_types = np.zeros_like(token_ids)
        token_types[place : place + len(video.token_types)] = video.token_types
        timing = [] if video.second_per_grid is None else [video.second_per_grid]
        timing += [] if clip.is_plain else [*clip.timestamps_s.tolist(), clip.duration_s]
        return EncodedPrompt(
            prompt_id=prompt.prompt_id,
            token_ids=token_ids,
            unexpanded_token_ids=unexpanded,
            frames=frames,
            frames_digest=digest,
            patching=self._patching,
            video_metadata=metadata | {"do_sample_frames": False},
            video_grid_thw=video.grid_thw,
            token_types=token_types,
            second_per_grid=video.second_per_grid,
            fingerprint=fingerprint(token_ids, video.grid_thw, clip.frame_indices, digest, timing),
            style=prompt.style,
        )

    def token_ids(self, prompt: Prompt) -> np.ndarray:
        """int32[M]: those of `encode`, which are known without the clip's pixels."""
        video = self._video_text(json.dumps(video_metadata(prompt.clip)))
        return self._expanded(self._unexpanded(prompt), video)

    def _expanded(self, unexpanded: list[int], video: VideoText) -> np.ndarray:
        """int32[M]: the video's text in the place of its pad."""
        text, place = np.asarray(unexpanded, np.int32), unexpanded.index(self.pad_ids[0])
        return np.concatenate([text[:place], video.token_ids, text[place + 1 :]])

    def _unexpanded(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt, its video one pad. Raises DataError unless it has one video."""
        messages = chat_messages(self._config, prompt.query, prompt.style)
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self._to_ids(text)
        if (found := [ids.count(pad) for pad in self.pad_ids]) != [1, 0]:
            what = f"its text has {found[0]} video pads and {found[1]} image pads instead of 1 and 0"
            raise DataError(f"prompt {prompt.prompt_id}: {what}: reword its query or the chat template")
        return ids

    def _text_of_video(self, metadata_json: str) -> VideoText:
        """What the processor itself writes for frames of this number, size and time, without any pixel."""
        import torch

        metadata = json.loads(metadata_json)
        shape = len(metadata["frames_indices"]), metadata["height"], metadata["width"], 3
        found, (text,) = self._processor._process_videos(
            [torch.empty(shape, dtype=torch.uint8, device="meta")],  # has a shape and no pixels
            video_metadata=[metadata],
            do_sample_frames=False,
            do_rescale=False,
            do_normalize=False,
            return_metadata=True,
        )
        runs = [len(run) // len(VIDEO_PAD) for run in _PADS.findall(text)]
        ids = np.asarray(self._to_ids(_PADS.sub(VIDEO_PAD, text)))  # a run of pads is tokenized as one
        is_pad = ids == self.pad_ids[0]
        repeats = np.ones(len(ids), np.int64)
        repeats[is_pad] = runs
        (types,) = self._processor.create_mm_token_type_ids([ids.tolist()])
        seconds = found.get("second_per_grid_ts")
        return VideoText(
            token_ids=np.repeat(ids, repeats).astype(np.int32),
            token_types=np.repeat(types, repeats).astype(np.int32),
            grid_thw=tuple(found["video_grid_thw"][0].tolist()),
            second_per_grid=seconds and float(seconds[0]),
        )

    def _check_size(self, clip: Clip, video: VideoText) -> None:
        """Raises ModelError if the processor would resize the frames."""
        _, rows, columns = video.grid_thw
        patch = self._patching.patch_size
        if (rows * patch, columns * patch) != clip.frame_size:
            resized = f"the processor resizes {clip.frame_size} frames to {rows, columns} patches of {patch}"
            raise ModelError(
                f"clip {clip.clip_id}: {resized}: bring video.max_video_tokens within its limits"
            )


def check_parity(encoded: EncodedPrompt, trajectory: Trajectory, party: str) -> None:
    """Raises ParityError unless `party` sees the prompt as the trajectory's actor, if any, did.

    Not for a teacher with a view of its own: it shares the response's tokens alone.
    """
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
    different = np.flatnonzero(ours != theirs)
    return "".join(f"token {i} is {ours[i]} here, {theirs[i]} there" for i in different[:1])
