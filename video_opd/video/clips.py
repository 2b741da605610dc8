"""Video -> Clip -> frames: which frames of a video, at which size, and their pixels.

Frames are resized here, so the model's processor resizes nothing: models see the fingerprinted pixels.
"""

import math
import os
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from video_opd.config_data import VideoConfig
from video_opd.errors import BrokenVideo, ClipError
from video_opd.types import Clip, Span
from video_opd.video.decode_pool import shared_pool
from video_opd.video.quarantine import quarantine
from video_opd.video.video_file import VideoInfo

TEMPORAL_PATCH = 2  # frames in one video token, in every Qwen-VL model
SLACK_S = 1e-3  # times in files are rounded
FRAMES_AT_ONCE = 8  # resized together: bounds the memory
Size = tuple[int, int]


def choose_frame_indices(num_video_frames: int, video_fps: float, video: VideoConfig) -> np.ndarray:
    """int64[F]: `fps` frames a second from the first frame on, F even and within [min_frames, max_frames].

    If `fps` would give too many or too few, F frames are spread evenly over the video instead.
    """
    wanted = math.floor(num_video_frames / video_fps * video.fps)
    num_frames = min(max(wanted, video.min_frames), video.max_frames, num_video_frames)
    num_frames = max(num_frames - num_frames % TEMPORAL_PATCH, TEMPORAL_PATCH)
    as_asked = num_frames in (wanted, wanted - 1) and video.fps <= video_fps
    step = video_fps / video.fps if as_asked else num_video_frames / num_frames
    return np.minimum(np.floor(np.arange(num_frames) * step), num_video_frames - 1).astype(np.int64)


def choose_frame_size(height: int, width: int, num_frames: int, video: VideoConfig, multiple: int) -> Size:
    """(H, W): multiples of `multiple`, aspect ratio kept, at most max_video_tokens in all, never enlarged.

    One video token covers multiple x multiple pixels of TEMPORAL_PATCH frames; max_frame_tokens bounds these.
    """
    num_pairs = num_frames // TEMPORAL_PATCH
    tokens_per_frame_pair = video.max_video_tokens // num_pairs
    if tokens_per_frame_pair < 1:
        few = f"video.max_video_tokens={video.max_video_tokens} is less than {num_pairs} frame pairs need"
        raise ClipError(f"{few}: raise it or lower video.max_frames")
    tokens_per_frame_pair = min(tokens_per_frame_pair, video.max_frame_tokens or tokens_per_frame_pair)
    scale = min(1.0, math.sqrt(tokens_per_frame_pair * multiple**2 / (height * width)))
    rows = min(max(1, math.floor(height * scale / multiple)), tokens_per_frame_pair)
    columns = min(max(1, math.floor(width * scale / multiple)), tokens_per_frame_pair // rows)
    return rows * multiple, columns * multiple


def choose_frames_in_time(times_s: np.ndarray, video: VideoConfig) -> np.ndarray:
    """int64[F]: as choose_frame_indices, for frames at any times: those on display at even times, each once.

    times_s: float64, ascending. F is smaller than asked for if a frame stays on display for longer than the
    spacing; if fewer than min_frames would remain, evenly spaced indices are chosen instead.
    """
    num, duration_s = len(times_s), times_s[-1] - times_s[0] + _mean_gap(times_s)
    wanted = math.floor(duration_s * video.fps)
    num_frames = min(max(wanted, video.min_frames), video.max_frames, num)
    step_s = 1.0 / video.fps if num_frames == wanted else duration_s / num_frames
    at = times_s[0] + np.arange(num_frames) * step_s
    indices = np.unique(np.searchsorted(times_s, at + SLACK_S, side="right") - 1)
    fewest = min(video.min_frames, num)
    if len(indices) < fewest:
        indices = np.arange(fewest) * num // fewest
    return indices[: len(indices) - len(indices) % TEMPORAL_PATCH].astype(np.int64)


def _mean_gap(times_s: np.ndarray) -> float:
    return float(times_s[-1] - times_s[0]) / (len(times_s) - 1)


def describe_video(video_path: str | Path, video: VideoConfig) -> VideoInfo:
    """Opens a file or a folder of images and says what it shows; decodes all of it where only that tells.

    Raises ClipError, also for a file of one frame or of no rate; ConfigError if the decoder does not import.
    Thread-safe.
    """
    path = os.path.realpath(video_path)
    with quarantine(video.quarantine, video.decoder).watch(path):
        info = shared_pool(video).describe(path)
        if info.num_frames < TEMPORAL_PATCH or not (info.fps is None or 0 < info.fps < math.inf):
            raise BrokenVideo(path, f"has {info.num_frames} frames at {info.fps} a second")
    return info


def _cut(path: str, cut_s: Span | None, times_s: np.ndarray, duration_s: float) -> tuple[slice, float, float]:
    """The frames of a part of the video, its start and its duration in seconds. Raises ClipError."""
    if cut_s is None:
        return slice(0, len(times_s)), 0.0, duration_s
    start, end = cut_s
    if not (0 <= start < end < math.inf and start < duration_s):
        raise ClipError(f"video {path} lasts {duration_s:.2f} s: {start} to {end} s is not part of it")
    first, last = (int(i) for i in np.searchsorted(times_s, [start - SLACK_S, end - SLACK_S]))
    if last - first < TEMPORAL_PATCH:
        found = f"has {last - first} frames from {start} to {end} s"
        raise ClipError(f"video {path} {found}: at least {TEMPORAL_PATCH} are needed")
    return slice(first, last), start, min(end, duration_s) - start


def plan_clip(
    clip_id: str,
    video_path: str | Path,
    video: VideoConfig,
    multiple: int,
    cut_s: Span | None = None,
    info: VideoInfo | None = None,
) -> Clip:
    """Decides which frames, at which size, every process will see.

    video_path: a video file, or a folder of numbered images. multiple: patch_size * spatial_merge_size.
    cut_s: the clip is this part of the video, its end excluded, and its times count from the part's start.
    info: what describe_video says; None: it is asked. Raises ClipError, and what describe_video raises.
    """
    path = os.path.realpath(video_path)
    info = info or describe_video(path, video)
    fps = video.frame_folder_fps if info.fps is None else info.fps
    if fps is None:
        raise ClipError(f"{path} is a folder of frames: set video.frame_folder_fps, their frames a second")
    times = np.arange(info.num_frames) / fps if info.times_s is None else info.times_s
    part, start_s, duration_s = _cut(path, cut_s, times, info.num_frames / fps)
    if info.times_s is None:
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
        frame_times_s=None if info.times_s is None else times[indices],
        start_s=start_s,
        decode_megapixels=_num_decoded(info, indices) * math.prod(info.size) / 1e6,
    )


def _num_decoded(info: VideoInfo, indices: np.ndarray) -> int:
    """Frames that are decoded, at most, to read those at int64[F], ascending."""
    if info.key_gap is None:
        return info.num_frames
    return info.key_gap + int(np.minimum(np.diff(indices), info.key_gap).sum())


def num_video_tokens(clip: Clip, multiple: int) -> int:
    """Of the clip in a prompt, without the timestamps between them. multiple: as plan_clip's."""
    height, width = clip.frame_size
    return len(clip.frame_indices) // TEMPORAL_PATCH * (height // multiple) * (width // multiple)


def read_frames(clip: Clip, video: VideoConfig) -> np.ndarray:
    """uint8[F, H, W, 3], RGB: the clip's frames, decoded and resized. Raises ClipError.

    Nothing is cached: processes of a run call FrameCache.read.
    """
    frames = np.empty((len(clip.frame_indices), *clip.frame_size, 3), np.uint8)
    done = 0
    with quarantine(video.quarantine, video.decoder).watch(clip.video_path):
        asked = clip.frame_indices, clip.num_video_frames, clip.decode_megapixels
        for part in shared_pool(video).read(clip.video_path, *asked):
            same_size = part.shape[1:3] == clip.frame_size
            frames[done : done + len(part)] = part if same_size else _resize(part, clip.frame_size)
            done += len(part)
    return frames


def _resize(frames: np.ndarray, size: Size) -> np.ndarray:
    """uint8[F, *size, 3]. Bicubic with antialiasing, as the Qwen-VL processors do."""
    import torch

    resized = np.empty((len(frames), *size, 3), np.uint8)
    for i in range(0, len(frames), FRAMES_AT_ONCE):
        pixels = torch.from_numpy(frames[i : i + FRAMES_AT_ONCE]).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        resized[i : i + FRAMES_AT_ONCE] = pixels.permute(0, 2, 3, 1).numpy()
    return resized


def frames_key(clip: Clip) -> Hashable:
    """Equal for clips of the same frames of the same file at the same size."""
    return clip.video_path, clip.frame_size, clip.frame_indices.tobytes()
