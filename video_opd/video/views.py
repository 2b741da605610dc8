"""Another view of a clip: other frames, more pixels, or only the part around the true spans."""

from collections.abc import Sequence
from dataclasses import replace

from video_opd.config_data import VideoConfig
from video_opd.types import Prompt, Span
from video_opd.video.clips import plan_clip
from video_opd.video.video_file import VideoInfo


def viewed(
    prompt: Prompt, video: VideoConfig, multiple: int, info: VideoInfo, margin_frac: float | None = None
) -> Prompt:
    """The prompt whose clip's frames are chosen by `video`; times still count from the clip's own start.

    margin_frac: frames are those within `crop_of` its true spans alone, shown at their times in the whole
    clip, so that an answer in seconds means the same; None, or no true spans: of the whole clip.
    multiple: as plan_clip's; info: what describe_video says of the clip's video. Raises ClipError.
    """
    clip = prompt.clip
    whole = (clip.start_s, clip.duration_s) == (0.0, info.num_frames / clip.video_fps)
    part = None if whole else (clip.start_s, clip.start_s + clip.duration_s)
    if margin_frac is not None and prompt.answer_spans_s:
        least_s = video.min_frames / video.fps
        start, end = crop_of(prompt.answer_spans_s, clip.duration_s, margin_frac, least_s)
        part = clip.start_s + start, clip.start_s + end
    seen = plan_clip(clip.clip_id, clip.video_path, video, multiple, part, info)
    return replace(prompt, clip=replace(seen, start_s=clip.start_s, duration_s=clip.duration_s))


def crop_of(spans: Sequence[Span], duration_s: float, margin_frac: float, least_s: float) -> Span:
    """From the first start to the last end, with margin_frac of that length on both sides, within the clip.

    The margins are larger where it would last less than least_s, in which `min_frames` frames fit.
    """
    start, end = min(s for s, _ in spans), max(e for _, e in spans)
    margin = max(margin_frac * (end - start), (least_s - (end - start)) / 2)
    return max(0.0, start - margin), min(duration_s, end + margin)
