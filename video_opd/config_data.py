"""Sections of the configuration: annotations, videos, prompts."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from video_opd.content import is_inside
from video_opd.prompt_styles import STYLES


def file_name(name: str) -> str:
    if "/" in name or name.startswith(".") or not name.isprintable() or not is_inside(name):
        raise ValueError("it names a file: write it without /, \\ and a dot in front")
    return name


PositiveInt = Annotated[int, Field(gt=0, strict=True)]


NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Fraction = Annotated[float, Field(ge=0, le=1)]


FileName = Annotated[str, AfterValidator(file_name)]


Dtype = Literal["float32", "bfloat16"]


PromptStyle = Literal["timelens", "time_r1", "time_r1_think", "timelens2"]


AnnotationFormat = Literal[
    "auto",
    "charades_sta",
    "charades_json",
    "activitynet",
    "qvhighlights",
    "timelens_bench",
    "timelens_100k",
    "time_r1",
    "tvgbench",
    "didemo",
    "tacos",
    "videomind",
    "manifest",
]


class ConfigSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def regular_expression(pattern: str) -> str:
    """The pattern, once it is known to be one."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


class DatasetConfig(ConfigSection):
    """One annotated split."""

    format: AnnotationFormat = Field(
        default="charades_sta", description="annotation format, see docs/data.md; auto: by content"
    )
    annotations: str = Field(description="annotation file, or a manifest")
    lengths: str | None = Field(
        default=None, description="charades_sta: csv with the columns id and length (seconds)"
    )
    videos: str = Field(description="folder of the video files")
    cleaning: Literal["as_written", "strip", "parse_query", "time_r1"] | None = Field(
        default=None, description="how queries are cleaned; None: as the format's codebase does"
    )
    round_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="annotated times are rounded to multiples of it; 0: not; None: as the format's codebase does",
    )
    annotators: Literal["mean", "majority", "first", "all"] | None = Field(
        default=None, description="didemo: which of several annotators' intervals count; None: mean"
    )
    cuts: Literal["apply", "ignore"] | None = Field(
        default=None, description="time_r1, tvgbench: ignore where the files are cut already; None: apply"
    )
    clamp_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.0,
        description="an annotation that ends beyond its clip by at most this is cut at the clip's end",
    )
    max_prompts: PositiveInt | None = Field(default=None, description="use only the first so many prompts")
    unreadable: Literal["error", "drop"] = Field(
        default="error",
        description="data.train: a video that cannot be opened ends the launch, or its prompts are left out",
    )


class DataConfig(ConfigSection):
    train: DatasetConfig
    eval: DatasetConfig

    @model_validator(mode="after")
    def _evaluation_leaves_nothing_out(self):
        if self.eval.unreadable != "error":
            raise ValueError(
                "data.eval.unreadable=drop would leave failures out of the metrics: mend the videos"
            )
        return self


class VideoConfig(ConfigSection):
    """Which frames, at which size, every model sees."""

    fps: PositiveFloat = Field(default=2.0, description="frames sampled a second")
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    max_video_tokens: PositiveInt = Field(default=8192, description="frames are scaled down to stay within")
    frame_folder_fps: PositiveFloat | None = Field(
        default=None,
        description="frames a second of videos that are folders of numbered images; None: there are none",
    )
    decoder: Literal["decord", "pyav", "torchcodec"] = "decord"
    decode_workers: PositiveInt = Field(
        default=4, description="decoding processes of each process, started when first needed"
    )
    decode_timeout_s: PositiveFloat = Field(
        default=60.0, description="a clip that takes longer is given up, its worker killed"
    )
    quarantine: str | None = Field(
        default=None,
        description="JSON lines file of videos that could not be decoded, which no run tries again; None: known to a process alone",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder on the node for decoded frames, shared by its processes; None: in the temporary folder",
    )
    cache_bytes: PositiveInt = Field(
        default=8 << 30, description="decoded frames kept there, also from one run to the next"
    )

    @model_validator(mode="after")
    def _ordered(self):
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} is more than max_frames={self.max_frames}")
        if self.min_frames % 2 or self.max_frames % 2:
            raise ValueError(
                f"min_frames={self.min_frames} and max_frames={self.max_frames} must be even: tokens cover two frames"
            )
        return self


class PromptConfig(ConfigSection):
    style: PromptStyle = Field(
        default="timelens",
        description="published prompt; template, answer_template and video_first are its own where not given",
    )
    template: str = Field(default=STYLES["timelens"]["template"], description="must contain {query}")
    answer_template: str = Field(
        default=STYLES["timelens"]["answer_template"],
        description="how the truth is written where it is an answer",
    )
    video_first: bool = Field(default=STYLES["timelens"]["video_first"], description="video before the text")

    @model_validator(mode="before")
    @classmethod
    def _of_the_style(cls, values: Any) -> Any:
        style = values.get("style") if isinstance(values, dict) else None
        return STYLES[style] | values if style in STYLES else values

    @model_validator(mode="after")
    def _has_query(self):
        if "{query}" not in self.template:
            raise ValueError("template must contain {query}")
        try:
            self.template.format(query="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"template may hold {{query}} and no other braces ({error!r})") from None
        try:
            self.answer_template.format(start=0.0, end=0.0)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"answer_template may hold {{start}} and {{end}} with number formats alone ({error!r})"
            ) from None
        return self
