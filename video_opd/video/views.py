"""Another view of a clip: other frames, more pixels, or only the part around the true spans."""

from collections.abc import Sequence
from dataclasses import replace

from video_opd.config import Config
from video_opd.config_data import VideoConfig
from video_opd.config_teachers import TeacherModel
from video_opd.errors import ClipError, ConfigError, DataError
from video_opd.types import Prompt, Span
from video_opd.video.clips import plan_clip
from video_opd.video.descriptions import describe_all
from video_opd.video.video_file import VideoInfo


def check_crop_model(teacher: TeacherModel, model_type: str) -> None:
    """A crop needs times that are written before frames. Raises ConfigError."""
    if teacher.crop_margin_frac is not None and model_type != "qwen3_vl":
        counts = f"{model_type} counts times from the first frame that it is shown"
        what = f"teachers {teacher.name}: crop_margin_frac: {counts}"
        raise ConfigError(f"{what}: use a Qwen3-VL teacher, or leave it out")


def viewed(
    prompt: Prompt, teacher: TeacherModel, video: VideoConfig, multiple: int, info: VideoInfo
) -> Prompt:
    """The prompt as the teacher sees it: its frames are chosen by `video`, the teacher's own.

    With crop_margin_frac and true spans they are those within `crop_of`, shown at their times in the whole
    clip, so that an answer in seconds means the same. A teacher's own prompt takes the place of a source's.
    multiple: as plan_clip's; info: what describe_video says of the clip's video. Raises ClipError.
    """
    clip = prompt.clip
    whole = (clip.start_s, clip.duration_s) == (0.0, info.num_frames / clip.video_fps)
    part = None if whole else (clip.start_s, clip.start_s + clip.duration_s)
    margin_frac = teacher.crop_margin_frac
    if margin_frac is not None and prompt.answer_spans_s:
        least_s = video.min_frames / video.fps
        start, end = crop_of(prompt.answer_spans_s, clip.duration_s, margin_frac, least_s)
        part = clip.start_s + start, clip.start_s + end
    seen = plan_clip(clip.clip_id, clip.video_path, video, multiple, part, info)
    seen = replace(seen, start_s=clip.start_s, duration_s=clip.duration_s)
    return replace(prompt, clip=seen, style=None if teacher.prompt else prompt.style)


def crop_of(spans: Sequence[Span], duration_s: float, margin_frac: float, least_s: float) -> Span:
    """From the first start to the last end, with margin_frac of that length on both sides, within the clip.

    The margins are larger where it would last less than least_s, in which `min_frames` frames fit.
    """
    start, end = min(s for s, _ in spans), max(e for _, e in spans)
    margin = max(margin_frac * (end - start), (least_s - (end - start)) / 2)
    return max(0.0, start - margin), min(duration_s, end + margin)


def all_viewed(
    config: Config, teacher: TeacherModel, prompts: Sequence[Prompt], multiple: int
) -> list[Prompt]:
    """The prompts as the teacher sees them. Raises DataError where one cannot be seen so."""
    video = teacher.view(config.prompt, config.video)[1]
    infos = describe_all(dict.fromkeys(p.clip.video_path for p in prompts), video, config.runs_dir)
    seen = []
    for prompt in prompts:
        try:
            info = infos[prompt.clip.video_path]
            if isinstance(info, ClipError):
                raise info
            seen.append(viewed(prompt, teacher, video, multiple, info))
        except ClipError as error:
            what = f"prompt {prompt.prompt_id}, as teacher {teacher.name} sees it"
            raise DataError(f"{what}: {error}: change its video or crop_margin_frac, or the data") from error
    return seen
