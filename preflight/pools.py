"""What the seconds of a split's prompts depend on."""

from dataclasses import dataclass

from preflight.memory import Workload, longest_sequence
from preflight.model_shapes import ModelShapes
from preflight.time import Grid, Sizes, mean_size, size_of
from video_opd.config import Config
from video_opd.datasets import Split
from video_opd.types import Clip
from video_opd.video.clips import TEMPORAL_PATCH, frames_key


@dataclass(frozen=True)
class Pool:
    """The prompts of a split."""

    student: Sizes
    teacher: Sizes | None
    num_prompts: int = 0  # 0: they are not here
    prompts_a_video: float = 1.0
    megapixels: float = 0.0  # decoded for a clip


def pool_of(
    split: Split | None, work: Workload, config: Config, student: ModelShapes, teacher: ModelShapes | None
) -> Pool:
    """The prompts of a split; None: prompts that fill the config's video budget, as `work` has them."""
    models = [student, *([teacher] if teacher else [])]
    if split is None:
        sizes = [_size_of_budget(config, work, shapes) for shapes in models]
        return Pool(sizes[0], sizes[1] if teacher else None)
    prompts = split.prompts
    clips = {frames_key(p.clip): p.clip for p in prompts}.values()
    sizes = [mean_size(_size_of_prompt(p.clip, shapes, work) for p in prompts) for shapes in models]
    megapixels = sum(c.decode_megapixels for c in clips) / len(clips)
    return Pool(sizes[0], sizes[1] if teacher else None, len(prompts), len(prompts) / len(clips), megapixels)


def _size_of_prompt(clip: Clip, shapes: ModelShapes, work: Workload) -> Sizes:
    """With an allowance for text, but no longer than the longest prompt, which may have been counted."""
    size = size_of(shapes, grid := _grid(clip, shapes))
    return size if size.tokens <= work.max_prompt_tokens else size_of(shapes, grid, work.max_prompt_tokens)


def _grid(clip: Clip, shapes: ModelShapes) -> Grid:
    (height, width), side = clip.frame_size, shapes.vision.patch[-1]
    return len(clip.frame_indices) // TEMPORAL_PATCH, height // side, width // side


def _size_of_budget(config: Config, work: Workload, shapes: ModelShapes) -> Sizes:
    video, window = config.video, shapes.vision.window
    tokens = longest_sequence(config, work, config.rollout.max_model_len) - config.rollout.max_response_tokens
    patches = work.max_video_tokens * shapes.vision.patches_a_token
    of_pair = patches / min(video.max_frames // TEMPORAL_PATCH, work.max_video_tokens)
    return Sizes(tokens, tokens**2, patches, patches * of_pair, patches * min(of_pair, window**2))
