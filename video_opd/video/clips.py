"""Video -> Clip -> frames: which frames, at which size, and their pixels. Decoding is done by decode_pool.

Frames are resized here as well, so that the model's processor has nothing left to resize: what is
fingerprinted is what every model sees.
"""

import math
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import numpy as np

from video_opd.config_data import VideoConfig
from video_opd.content import file_stamp
from video_opd.errors import ClipError
from video_opd.types import Clip, Span
from video_opd.video.decode_pool import BrokenVideo, shared_pool
from video_opd.video.decoders import VideoInfo
from video_opd.video.quarantine import Quarantine

TEMPORAL_PATCH = 2  # frames in one video token, in every Qwen-VL model
SLACK_S = 1e-3  # times in files are rounded
FRAMES_AT_ONCE = 8  # resized together: bounds the memory


def choose_frame_indices(num_video_frames: int, video_fps: float, video: VideoConfig) -> np.ndarray:
    """int64[F]: `fps` frames a second from the first frame on, F even and within [min_frames, max_frames].

    Where `fps` would give more than max_frames or fewer than min_frames, the F frames are spread evenly instead.
    """
    wanted = math.floor(num_video_frames / video_fps * video.fps)
    num_frames = min(max(wanted, video.min_frames), video.max_frames, num_video_frames)
    num_frames = max(num_frames - num_frames % TEMPORAL_PATCH, TEMPORAL_PATCH)
    as_asked = num_frames in (wanted, wanted - 1) and video.fps <= video_fps
    step = video_fps / video.fps if as_asked else num_video_frames / num_frames
    return np.minimum(np.floor(np.arange(num_frames) * step), num_video_frames - 1).astype(np.int64)


def choose_frame_size(
    height: int, width: int, num_frames: int, video: VideoConfig, multiple: int
) -> tuple[int, int]:
    """(H, W): multiples of `multiple`, aspect ratio kept, at most max_video_tokens in all and no enlargement.

    One video token covers multiple x multiple pixels of TEMPORAL_PATCH frames.
    """
    tokens_per_frame_pair = video.max_video_tokens // (num_frames // TEMPORAL_PATCH)
    if tokens_per_frame_pair < 1:
        raise ClipError(
            f"video.max_video_tokens={video.max_video_tokens} is less than one token for each of "
            f"{num_frames // TEMPORAL_PATCH} frame pairs: raise it or lower video.max_frames"
        )
    scale = min(1.0, math.sqrt(tokens_per_frame_pair * multiple**2 / (height * width)))
    rows = max(1, math.floor(height * scale / multiple))
    columns = max(1, math.floor(width * scale / multiple))
    rows = min(rows, tokens_per_frame_pair)
    columns = min(columns, tokens_per_frame_pair // rows)
    return rows * multiple, columns * multiple


def choose_frames_in_time(times_s: np.ndarray, video: VideoConfig) -> np.ndarray:
    """int64[F]: as choose_frame_indices, for frames at any times: those on display at even times, each once.

    times_s: float64, ascending. Where a frame stays on display for longer than a spacing, F is smaller than asked for; where that
    would leave fewer than min_frames, every so many frames are chosen instead.
    """
    num, duration_s = len(times_s), times_s[-1] - times_s[0] + _spacing_s(times_s)
    wanted = math.floor(duration_s * video.fps)
    num_frames = min(max(wanted, video.min_frames), video.max_frames, num)
    step_s = 1.0 / video.fps if num_frames == wanted else duration_s / num_frames
    at = times_s[0] + np.arange(num_frames) * step_s
    indices = np.unique(np.searchsorted(times_s, at + SLACK_S, side="right") - 1)
    fewest = min(video.min_frames, num)
    if len(indices) < fewest:
        indices = np.arange(fewest) * num // fewest
    return indices[: len(indices) - len(indices) % TEMPORAL_PATCH].astype(np.int64)


def _spacing_s(times_s: np.ndarray) -> float:
    """The mean time from one frame to the next."""
    return float(times_s[-1] - times_s[0]) / (len(times_s) - 1)


def _times(path: str, info: VideoInfo, video: VideoConfig) -> tuple[float, np.ndarray | None]:
    """Frames a second, and every frame's time in seconds; None: constant, index / fps. Raises ClipError.

    A rate is constant if no frame is further than half a frame from its place.
    """
    fps = info.fps
    if fps is None:
        if video.frame_folder_fps is None:
            raise ClipError(
                f"{path} is a folder of frames: set video.frame_folder_fps, the rate at which they were taken"
            )
        fps = video.frame_folder_fps
    times = info.times_s
    if info.num_frames >= TEMPORAL_PATCH and math.isfinite(fps) and fps > 0:
        if times is None or np.abs(times - np.arange(info.num_frames) / fps).max() <= 0.5 / fps:
            return fps, None
        return 1.0 / _spacing_s(times), times
    raise BrokenVideo(path, f"has {info.num_frames} frames at {fps} a second")


def _cut(path: str, cut_s: Span | None, times_s: np.ndarray, duration_s: float) -> tuple[slice, float, float]:
    """The frames of a part of the video, its start and its duration in seconds. Raises ClipError."""
    if cut_s is None:
        return slice(0, len(times_s)), 0.0, duration_s
    start, end = cut_s
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end and start < duration_s):
        raise ClipError(f"video {path} lasts {duration_s:.2f} s: {start} to {end} s is no part of it")
    first, last = np.searchsorted(times_s, [start - SLACK_S, end - SLACK_S])
    if last - first < TEMPORAL_PATCH:
        raise ClipError(
            f"video {path} has {last - first} frames from {start} to {end} s: {TEMPORAL_PATCH} are the fewest"
        )
    return slice(int(first), int(last)), start, min(end, duration_s) - start


def plan_clip(
    clip_id: str, video_path: str | Path, video: VideoConfig, multiple: int, cut_s: Span | None = None
) -> Clip:
    """Opens the file once and decides which frames, at which size, every party will see.

    `video_path`: a video file, or a folder of numbered images. `multiple`: the model's patch_size * spatial_merge_size.
    `cut_s`: the clip is this part of the video, its times count from the part's start; frames from the start on and before the end.
    Raises ClipError if there is no such clip, ConfigError if the decoder does not import. Threads may plan side by side.
    """
    path = str(Path(video_path).resolve())
    stamp = _stamp(path, video)
    try:
        info = shared_pool(video).describe(path)
        fps, times = _times(path, info, video)
    except BrokenVideo as error:
        _quarantine(video).add(path, stamp, error.reason)
        raise
    all_times = np.arange(info.num_frames) / fps if times is None else times
    part, start_s, duration_s = _cut(path, cut_s, all_times, info.num_frames / fps)
    if times is None:
        indices = part.start + choose_frame_indices(part.stop - part.start, fps, video)
    else:
        indices = part.start + choose_frames_in_time(times[part], video)
    return Clip(
        clip_id=clip_id,
        video_path=path,
        num_video_frames=info.num_frames,
        video_fps=fps,
        duration_s=duration_s,
        frame_indices=indices,
        frame_size=choose_frame_size(*info.size, len(indices), video, multiple),
        frame_times_s=None if times is None else times[indices],
        start_s=start_s,
    )


def num_video_tokens(clip: Clip, multiple: int) -> int:
    """Of the clip in a prompt, the timestamps between them not counted. `multiple`: see plan_clip."""
    height, width = clip.frame_size
    return len(clip.frame_indices) // TEMPORAL_PATCH * (height // multiple) * (width // multiple)


def read_frames(clip: Clip, video: VideoConfig) -> np.ndarray:
    """uint8[F, H, W, 3], RGB: the clip's frames, decoded and resized. Raises ClipError.

    Nothing is cached: FrameCache.read is what every party of a run calls.
    """
    stamp = _stamp(clip.video_path, video)
    frames = np.empty((len(clip.frame_indices), *clip.frame_size, 3), np.uint8)
    done = 0
    try:
        for part in shared_pool(video).read(clip.video_path, clip.frame_indices, clip.num_video_frames):
            frames[done : done + len(part)] = (
                part if part.shape[1:3] == clip.frame_size else _resize(part, clip.frame_size)
            )
            done += len(part)
    except BrokenVideo as error:
        _quarantine(video).add(clip.video_path, stamp, error.reason)
        raise
    return frames


def _stamp(path: str, video: VideoConfig) -> str:
    """See content.file_stamp. Raises ClipError if the video is missing or known to be broken."""
    try:
        stamp = file_stamp(path)
    except FileNotFoundError:
        raise ClipError(
            f"video {path} is missing: put it there, or take its lines out of the annotations"
        ) from None
    if reason := _quarantine(video).reason(path, stamp):
        raise BrokenVideo(path, reason)
    return stamp


def _quarantine(video: VideoConfig) -> Quarantine:
    return _quarantine_of(video.quarantine, video.decoder)


@lru_cache
def _quarantine_of(path: str | None, decoder: str) -> Quarantine:
    return Quarantine(path, decoder)


def _resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[F, *size, 3]. Bicubic with antialiasing, as the Qwen-VL processors do."""
    import torch

    resized = np.empty((len(frames), *size, 3), np.uint8)
    for i in range(0, len(frames), FRAMES_AT_ONCE):
        pixels = torch.from_numpy(frames[i : i + FRAMES_AT_ONCE]).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        resized[i : i + FRAMES_AT_ONCE] = (
            pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        )
    return resized


def frames_key(clip: Clip) -> Hashable:
    """The same for clips of the same frames of the same file at the same size."""
    return clip.video_path, clip.frame_size, clip.frame_indices.tobytes()
