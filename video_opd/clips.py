"""Clip -> frames. The only importer of decord; every party reads its frames here.

Frames are resized here as well, so that the model's processor has nothing left to resize: what is
fingerprinted is what every model sees.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import decord
import numpy as np

from video_opd.config import VideoConfig
from video_opd.errors import ClipError
from video_opd.types import Clip

decord.logging.set_level(decord.logging.QUIET)  # its errors are raised; the log lines add nothing

TEMPORAL_PATCH = 2  # frames in one video token, in every Qwen-VL model


def _open(path: str) -> decord.VideoReader:
    if not Path(path).is_file():
        raise ClipError(f"video {path} is missing: put it there, or take its lines out of the annotations")
    try:
        return decord.VideoReader(path, num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        raise ClipError(f"video {path} cannot be opened ({_first_line(error)}): replace the file") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


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


def choose_frame_size(height: int, width: int, num_frames: int, video: VideoConfig, multiple: int) -> tuple[int, int]:
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


def plan_clip(clip_id: str, video_path: str | Path, video: VideoConfig, multiple: int) -> Clip:
    """Opens the file once and decides which frames, at which size, every party will see.

    `multiple`: the model's patch_size * spatial_merge_size. Raises ClipError if the file cannot be opened.
    """
    path = str(Path(video_path).resolve())
    reader = _open(path)
    num_video_frames, fps = len(reader), float(reader.get_avg_fps())
    if num_video_frames < TEMPORAL_PATCH or not fps > 0:
        raise ClipError(f"video {path} has {num_video_frames} frames at {fps} a second: replace the file")
    indices = choose_frame_indices(num_video_frames, fps, video)
    try:
        height, width = reader[0].shape[:2]
    except (RuntimeError, decord.DECORDError) as error:
        raise ClipError(f"video {path} cannot be decoded ({_first_line(error)}): replace the file") from error
    return Clip(
        clip_id=clip_id,
        video_path=path,
        num_video_frames=num_video_frames,
        video_fps=fps,
        duration_s=num_video_frames / fps,
        frame_indices=indices,
        frame_size=choose_frame_size(height, width, len(indices), video, multiple),
    )


def read_frames(clip: Clip) -> np.ndarray:
    """uint8[F, H, W, 3], RGB: the clip's frames, decoded and resized. Raises ClipError."""
    reader = _open(clip.video_path)
    if len(reader) != clip.num_video_frames:
        raise ClipError(f"video {clip.video_path} had {clip.num_video_frames} frames, now {len(reader)}: it was replaced")
    try:
        frames = reader.get_batch(clip.frame_indices).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise ClipError(f"video {clip.video_path} cannot be decoded ({_first_line(error)}): replace it") from error
    return frames if frames.shape[1:3] == clip.frame_size else _resize(frames, clip.frame_size)


def _resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing, as the Qwen-VL processors do."""
    import torch

    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def frames_key(clip: Clip) -> Hashable:
    """The same for clips of the same frames of the same file at the same size."""
    return clip.video_path, clip.frame_size, clip.frame_indices.tobytes()


class FrameCache:
    """The last decoded clips of this process, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._frames: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self.num_decodes = 0

    def read(self, clip: Clip) -> np.ndarray:
        key = frames_key(clip)
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        frames = read_frames(clip)
        frames.flags.writeable = False
        self.num_decodes += 1
        self._frames[key] = frames
        self._bytes += frames.nbytes
        while self._bytes > self._max_bytes and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1].nbytes
        return frames
