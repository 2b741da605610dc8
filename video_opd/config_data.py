"""Configuration of annotations, videos and prompts, with the types that all sections share."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from video_opd.content import is_inside
from video_opd.types import Span

STYLES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("prompt_styles.yaml").read_text())
"""Keys of PromptConfig by prompt.style."""


def _file_name(name: str) -> str:
    if "/" in name or name.startswith(".") or not name.isprintable() or not is_inside(name):
        raise ValueError("it names a file: write it without /, \\ and a dot in front")
    return name


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NegativeFloat = Annotated[float, Field(lt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=2)]  # vLLM samples at 0.01 below it, and not above 2
FileName = Annotated[str, AfterValidator(_file_name)]
RegularExpression = Annotated[str, AfterValidator(_regular_expression)]
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "flash_attention_2", "flash_attention_3", "eager"]
ATTENTION = "attention of transformers; flash_attention_* need their package on the nodes"
"""As transformers names them; it has no flex_attention for Qwen-VL."""

Cleaning = Literal["as_written", "strip", "parse_query", "time_r1"]
Annotators = Literal["mean", "majority", "first", "all"]
PromptStyle = Literal["timelens", "time_r1", "time_r1_think", "timelens2"]
JsonFormat = Literal["charades_json", "activitynet", "qvhighlights", "timelens_bench", "timelens_100k"]
ListFormat = Literal["time_r1", "tvgbench", "didemo", "tacos", "videomind", "vue_tr", "moment_seeker"]
EventFormat = Literal["timelens2", "timelens2_chat", "ego4d_nlq"]
ParquetFormat = Literal["video_opd", "manifest"]
AnnotationFormat = Literal["auto", "charades_sta", "csv", JsonFormat, ListFormat, EventFormat, ParquetFormat]


class ConfigSection(BaseModel):
    """Base of every section: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with values that are valid on their own; the first is reported."""
        yield from ()

    @model_validator(mode="after")
    def _check(self):
        for problem in self.problems():
            raise ValueError(problem)
        return self


def key(default: Any, description: str) -> Any:
    """A configuration key with a default; `python launch.py --help` prints both."""
    return Field(default=default, description=description)


def attention_problem(attention: Attention, dtype: Dtype, num_gpus: float) -> str | None:
    """Why a role cannot compute attention so."""
    if not attention.startswith("flash") or (dtype == "bfloat16" and num_gpus):
        return None
    return f"attn_implementation={attention} computes in bfloat16 on a GPU: use sdpa"


class DatasetConfig(ConfigSection):
    """One annotated split."""

    format: AnnotationFormat = key("charades_sta", "annotation format, see docs/data.md; auto: by content")
    annotations: str = Field(description="annotation file, or a manifest")
    lengths: str | None = key(None, "charades_sta: csv with the columns id and length (seconds)")
    videos: str = Field(description="folder of the video files")
    cleaning: Cleaning | None = key(None, "how queries are cleaned; None: as the format's codebase does")
    round_s: NonNegativeFloat | None = key(None, "times become multiples of it; 0: no; None: as the codebase")
    annotators: Annotators | None = key(None, "didemo: which annotators' intervals count; None: mean")
    cuts: Literal["apply", "ignore"] | None = key(
        None, "apply: annotated parts are the clips; None: apply, ego4d_nlq: ignore"
    )
    query_pattern: RegularExpression | None = key(
        None, "video_opd, timelens2_chat: its group is the query; None: known"
    )
    clamp_s: NonNegativeFloat = key(0.0, "train: cut intervals that end up to this far beyond the clip's end")
    max_prompts: PositiveInt | None = key(None, "use only this many prompts, the first ones")
    unreadable: Literal["error", "drop"] = key("error", "train: a bad video ends the launch, or is left out")
    faulty: Literal["error", "drop"] = key("error", "train: a bad interval or query: the same choice")
    too_long: Literal["error", "drop"] = key("error", "train: a prompt beyond max_model_len: the same choice")

    def problems(self) -> Iterator[str]:
        if self.query_pattern and re.compile(self.query_pattern).groups != 1:
            yield f"query_pattern={self.query_pattern!r} must have one group, the query"


class SourceConfig(DatasetConfig):
    """One of several sources to train on."""

    name: FileName = Field(description="of the source, in its prompts' ids and its metrics")
    weight: PositiveFloat | None = key(None, "share of the drawn prompts, of the sum; None, for all: by size")
    prompt: PromptStyle | None = key(None, "published prompt of this source; None: the section prompt")


FORMS = ("one", "several")  # of data.train
Train = Annotated[
    Annotated[DatasetConfig, Tag("one")] | Annotated[tuple[SourceConfig, ...], Tag("several")],
    Discriminator(lambda value: FORMS[isinstance(value, list | tuple)]),
]


class DataConfig(ConfigSection):
    """The split to train on and the held-out split."""

    train: Train = Field(description="a split, or a list of them: docs/data.md, several sources")
    eval: DatasetConfig

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        """What to train on by the name of its source, which is empty where data.train is no list."""
        return {"": self.train} if isinstance(self.train, DatasetConfig) else {s.name: s for s in self.train}

    @property
    def styles(self) -> dict[str, PromptStyle | None]:
        """prompt.style of each source that is not the section prompt's; by name."""
        return {
            name: source.prompt for name, source in self.sources.items() if isinstance(source, SourceConfig)
        }

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources by name; empty: prompts are drawn from their union."""
        of_all = {
            name: source.weight for name, source in self.sources.items() if isinstance(source, SourceConfig)
        }
        return {name: weight for name, weight in of_all.items() if weight is not None}

    def problems(self) -> Iterator[str]:
        if not isinstance(self.train, DatasetConfig):
            names = [source.name for source in self.train]
            if not names or len(set(names)) < len(names):
                yield f"data.train lists the sources {names}: give one or more, each a name of its own"
            if 0 < len(self.weights) < len(names):
                yield "data.train has sources with weight and without: give all one, or none"
        if self.eval.unreadable != "error":
            yield "data.eval.unreadable=drop would leave failures out of the metrics: mend the videos"
        if self.eval.too_long != "error":
            yield "data.eval.too_long=drop would leave failures out of the metrics: raise max_model_len"
        if self.eval.faulty != "error":
            yield "data.eval.faulty=drop would leave prompts out: the truth is scored as it is published"


class VideoConfig(ConfigSection):
    """Which frames every model sees, at which size, and how they are decoded."""

    fps: PositiveFloat = key(2.0, "sampled frames per second")
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    max_video_tokens: PositiveInt = key(8192, "frames are scaled down to at most this many tokens")
    max_frame_tokens: PositiveInt | None = key(None, "most tokens of a pair of frames; None: no bound")
    frame_folder_fps: PositiveFloat | None = key(None, "frames per second of videos that are image folders")
    decoder: Literal["decord", "pyav", "torchcodec"] = "decord"
    decode_workers: PositiveInt = key(4, "decoding processes of each process, started when first needed")
    feed_bytes: PositiveInt = key(1 << 30, "frames that a process reads ahead of its engine, at most")
    decode_timeout_s: PositiveFloat = key(60.0, "bound on decoding 3,000 megapixels; in proportion for more")
    quarantine: str | None = key(None, "JSON lines file of broken videos for all runs; None: one per process")
    cache_dir: str | None = key(None, "folder of the node's cache of frames; None: in the temporary folder")
    cache_bytes: PositiveInt = key(8 << 30, "size of that cache, which outlives the run")

    @property
    def budget(self) -> str:
        """What a model sees of a video, which a score depends on."""
        frames = f"{self.fps:g} frames a second, {self.min_frames} to {self.max_frames}"
        pair = f", {self.max_frame_tokens} a pair of frames" if self.max_frame_tokens else ""
        return f"{frames}, at most {self.max_video_tokens} tokens{pair}"

    def problems(self) -> Iterator[str]:
        fewest, most = f"min_frames={self.min_frames}", f"max_frames={self.max_frames}"
        if self.min_frames > self.max_frames:
            yield f"{fewest} is more than {most}"
        if self.min_frames % 2 or self.max_frames % 2:
            yield f"{fewest} and {most} must be even: tokens cover two frames"


class _Pairs(tuple[Span, ...]):
    """Intervals that a format field writes as JSON, {spans:.1f} as [[1.0, 2.0], [3.5, 4.0]]."""

    def __format__(self, spec: str) -> str:
        return f"[{', '.join(f'[{start:{spec}}, {end:{spec}}]' for start, end in self)}]"


def _fields(template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name}
    except ValueError:  # which problems() reports
        return set()


class PromptConfig(ConfigSection):
    """The text around a query."""

    style: PromptStyle = key("timelens", "published prompt; sets the other keys where they are not given")
    template: str = key(STYLES["timelens"]["template"], "must contain {query}")
    answer_template: str = key(
        STYLES["timelens"]["answer_template"],
        "ground truth written as an answer; with {spans:.1f} all true spans, and answers are read as sets",
    )
    video_first: bool = key(STYLES["timelens"]["video_first"], "video before the text")

    @model_validator(mode="before")
    @classmethod
    def _apply_style(cls, values: Any) -> Any:
        style = values.get("style") if isinstance(values, dict) else None
        return STYLES[style] | values if style in STYLES else values

    @property
    def asks_for_sets(self) -> bool:
        """Whether an answer is a set of intervals, and not one."""
        return "spans" in _fields(self.answer_template)

    @property
    def span_iou(self) -> Literal["best", "merged"]:
        """How answers are scored, see grounding.prompt_iou."""
        return "merged" if self.asks_for_sets else "best"

    def answer(self, spans: Sequence[Span]) -> tuple[str, tuple[Span, ...]]:
        """The ground truth written as an answer, and the part of it that is written: all, or the first."""
        (start, end), *_ = spans
        written = tuple(spans) if self.asks_for_sets else ((start, end),)
        return self.answer_template.format(start=start, end=end, spans=_Pairs(spans)), written

    def of_style(self, style: str | None) -> "PromptConfig":
        """The section for prompts of a style of their own; None: itself."""
        return self if style is None else _published(style)

    def problems(self) -> Iterator[str]:
        if "{query}" not in self.template:
            yield "template must contain {query}"
        times = {"start": 0.0, "end": 0.0, "spans": _Pairs([(0.0, 0.0)])}
        values = {"template": {"query": ""}, "answer_template": times}
        for name, known in values.items():
            try:
                getattr(self, name).format(**known)
            except (KeyError, IndexError, ValueError) as error:
                yield f"{name} may hold {', '.join(known)} in braces and no other braces ({error!r})"
        if self.asks_for_sets and _fields(self.answer_template) & {"start", "end"}:
            yield "answer_template: {spans} writes all intervals: leave out {start} and {end}"


@cache
def _published(style: str) -> PromptConfig:
    return PromptConfig.model_validate({"style": style})
