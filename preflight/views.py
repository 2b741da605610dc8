"""Teachers that see more than the student: what they see of each prompt, checked before a start."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from preflight.memory import Workload, workload_of
from preflight.model_shapes import ModelShapes
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.datasets import Split
from video_opd.errors import ConfigError
from video_opd.models.lengths import PromptLengths
from video_opd.types import Prompt
from video_opd.video.views import all_viewed, check_crop_model


@dataclass(frozen=True)
class View:
    """What a teacher sees of a split's prompts."""

    prompts: list[Prompt]
    lengths: list[int]  # tokens of each
    work: Workload


def check_crop(teacher: TeacherModel, shapes: ModelShapes, train: Sequence[Prompt]) -> None:
    """A crop needs true spans, and times that are written before frames. Raises ConfigError."""
    if teacher.crop_margin_frac is None:
        return
    check_crop_model(teacher, shapes.model_type)
    unlabelled = [p.prompt_id for p in train if teacher.scores(p.prompt_id) and not p.answer_spans_s]
    if unlabelled:
        others = f" and {len(unlabelled) - 1} others" if unlabelled[1:] else ""
        has = f"needs ground truth, which prompt {unlabelled[0]}{others} lack: label or remove them"
        raise ConfigError(f"teachers {teacher.name}: crop_margin_frac {has}, or route them by `prompts`")


def view_of(
    config: Config, teacher: TeacherModel, shapes: ModelShapes, split: Split, is_cropped: bool
) -> View | None:
    """What it sees of its prompts; None: it has none. Raises DataError where that cannot be made."""
    own = [p for p in split.prompts if teacher.scores(p.prompt_id)]
    if not own:
        return None
    asked = own if is_cropped else [replace(p, answer_spans_s=None) for p in own]
    seen = all_viewed(config, teacher, asked, shapes.size_multiple)
    prompt, _ = teacher.view(config.prompt, config.video)
    lengths = PromptLengths(teacher.model, shapes.model_type, shapes.size_multiple, prompt).of(seen)
    return View(seen, lengths, workload_of(seen, shapes, max(lengths)))
