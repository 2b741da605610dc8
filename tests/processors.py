"""Both families' processors with the demo's tokenizer, and clips of every kind."""

from dataclasses import replace
from typing import Any

import numpy as np
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from demo.models import CHAT_TEMPLATE, build_processor, build_tokenizer
from tests.fakes import make_clip
from video_opd.types import Clip


def qwen2_5_processor() -> Qwen2_5_VLProcessor:
    options: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    options |= {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}}
    image, video = Qwen2VLImageProcessor(**options), Qwen2VLVideoProcessor(**options)
    return Qwen2_5_VLProcessor(image, build_tokenizer(), video, chat_template=CHAT_TEMPLATE)


FAMILIES = {"qwen3_vl": (build_processor, 32), "qwen2_5_vl": (qwen2_5_processor, 28)}


def clips_of(multiple: int) -> list[Clip]:
    """A plain one, a cut, one of a variable rate beyond 100 s, and one of many tokens."""
    times = np.array([0.0, 0.4, 9.96, 9.99, 100.0, 123.4])
    size = (multiple, multiple)
    uneven = replace(make_clip(), frame_indices=np.array([0, 3, 9, 10, 30, 40]), frame_times_s=times)
    return [
        replace(make_clip(), frame_size=size),
        replace(
            make_clip(), start_s=3.0, duration_s=4.0, frame_indices=np.arange(12, 28, 2), frame_size=size
        ),
        replace(uneven, duration_s=130.0, frame_size=size),
        replace(make_clip(), frame_size=(2 * multiple, 3 * multiple)),
    ]
