"""How long prompts are, before anything starts: by the tokenizer and the clips' grids, without pixels.

transformers is not imported: it would cost every launch 2 s of CPU time and 140 MiB.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from video_opd.config import Config
from video_opd.config_data import PromptConfig
from video_opd.errors import DataError, ModelError
from video_opd.models.model_files import read_json
from video_opd.models.prompting import VIDEO_PAD, chat_messages, video_metadata
from video_opd.types import Clip, Prompt
from video_opd.video.clips import TEMPORAL_PATCH, num_video_tokens

MARKS = 2  # of vision, around the tokens of each pair of frames
_RESERVED = (VIDEO_PAD, "<|image_pad|>")


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizers.Tokenizer of a model folder. Raises ModelError."""
    from tokenizers import Tokenizer

    path = Path(folder, "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ModelError(f"{path} cannot be read as a tokenizer ({error})") from error


class PromptLengths:
    """Counts the tokens that PromptEncoder.encode gives, exactly (tests/video_opd/test_lengths.py)."""

    def __init__(self, folder: str | Path, model_type: str, multiple: int, config: PromptConfig):
        """multiple: as plan_clip's. Raises ModelError if the folder lacks tokenizer.json or a template."""
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        try:
            self._template = _compile(_chat_template(Path(folder)))
        except TemplateError as error:
            raise ModelError(f"the chat template of {folder} cannot be read ({error}): correct it") from error
        self._config, self._multiple, self._has_times = config, multiple, model_type == "qwen3_vl"

    def of(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, video and timestamps included. Raises DataError: a query holds a pad."""
        for prompt in prompts:
            if any(pad in prompt.query for pad in _RESERVED):
                raise DataError(
                    f"prompt {prompt.prompt_id}: its query holds {' or '.join(_RESERVED)}: reword it"
                )
        clips = {id(p.clip): p.clip for p in prompts}  # prompts of a clip share it
        videos = dict(zip(clips, self._of_videos(list(clips.values())), strict=True))
        texts = self._count([self._text(p) for p in prompts])
        return [text - 1 + videos[id(p.clip)] for text, p in zip(texts, prompts, strict=True)]

    def _text(self, prompt: Prompt) -> str:
        messages = chat_messages(self._config, prompt.query, prompt.style)
        return self._template.render(messages=messages, add_generation_prompt=True)

    def _of_videos(self, clips: Sequence[Clip]) -> list[int]:
        """What stands in the place of each video's pad."""
        tokens = [num_video_tokens(clip, self._multiple) for clip in clips]
        if not self._has_times:
            return tokens
        times = [_timestamps(clip) for clip in clips]
        different = list({time for of_clip in times for time in of_clip})
        length = dict(zip(different, self._count(different), strict=True))
        return [n + sum(length[t] + MARKS for t in own) for n, own in zip(tokens, times, strict=True)]

    def _count(self, texts: Sequence[str]) -> list[int]:
        """One by one: after a batch, tokenizers warns in every process that is forked, and Ray forks."""
        return [len(self._tokenizer.encode(text).ids) for text in texts]


def _timestamps(clip: Clip) -> list[str]:
    """What Qwen3-VL's processor writes before each pair of frames, between special tokens."""
    metadata = video_metadata(clip)
    times = [index / metadata["fps"] for index in metadata["frames_indices"]]
    pairs = zip(times[::TEMPORAL_PATCH], times[TEMPORAL_PATCH - 1 :: TEMPORAL_PATCH], strict=True)
    return [f"<{(first + last) / 2:.1f} seconds>" for first, last in pairs]


def _chat_template(folder: Path) -> str:
    """Of the folder's processor, found as transformers does. Raises ModelError."""
    config, legacy, plain = (
        folder / n for n in ("processor_config.json", "chat_template.json", "chat_template.jinja")
    )
    own = read_json(config).get("chat_template") if config.is_file() else None
    if own is None and legacy.is_file():
        own = read_json(legacy).get("chat_template")
    if own is None and plain.is_file():
        own = plain.read_text(encoding="utf-8")
    if not isinstance(own, str):
        raise ModelError(f"{folder} has no chat template: download its chat_template.jinja or .json")
    return own


class _Generation(Extension):
    """Transformers' tag around what an assistant says. It writes nothing of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str):
    """A jinja2 template with the settings of transformers."""
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [loopcontrols, _Generation]}
    return ImmutableSandboxedEnvironment(**options).from_string(template)


class Limit(NamedTuple):
    """A bound on the tokens of a sequence."""

    key: str  # of the config
    most: int
    response: int  # tokens after the prompt


def rollout_limit(config: Config) -> Limit:
    """Of the engine that samples."""
    return Limit("rollout.max_model_len", config.rollout.max_model_len, config.rollout.max_response_tokens)


def limits(config: Config, trained: bool) -> list[Limit]:
    """What bounds the prompts of a split. trained: the training split."""
    found = []
    sampled = config.loss.needs.rollouts or config.curriculum.asks_student if trained else True
    if config.rollout.num_actors and sampled:
        found.append(rollout_limit(config))
    if config.needs_teacher and not all(t.has_view for t in config.teacher_models):
        found += teacher_limits(config)
    return found


def teacher_limits(config: Config) -> list[Limit]:
    """Of the teachers' engines."""
    if config.teacher_engine != "vllm":
        return []
    response = config.rollout.max_response_tokens + 1  # vLLM samples one more token
    return [Limit("teacher_pool.max_model_len", config.teacher_pool.max_model_len, response)]


def too_long(prompts: Sequence[Prompt], lengths: Sequence[int], bounds: Sequence[Limit]) -> Mapping[str, str]:
    """Prompt id -> why it does not fit, with the key to change."""
    failed = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        for bound in bounds:
            if (needed := length + bound.response) > bound.most:
                found = (
                    f"its {length} tokens and {bound.response} of a response exceed {bound.key}={bound.most}"
                )
                failed[prompt.prompt_id] = f"{found}: set it to {needed} or more, or shorten query or video"
                break
    return failed
