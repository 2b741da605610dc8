"""Features of a frozen vision tower are those of the model's own pass, and known clips cost no pixels."""

from dataclasses import replace

import numpy as np
import torch

import video_opd.models.patches
from demo.models import STUDENT, build_model, build_processor
from learner.vision_cache import VisionCache
from tests.fakes import make_clip, make_prompt
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.models.forward import ResponseLogits, collate
from video_opd.models.prompting import PromptEncoder


@torch.no_grad()
def test_cached_features_are_those_of_the_pass_and_known_clips_cost_no_pixels(tmp_path, monkeypatch):
    processor = build_processor()
    processor.save_pretrained(tmp_path)
    encoder = PromptEncoder(tmp_path, PromptConfig(), VideoConfig(cache_dir=str(tmp_path / "frames")))
    logits_of = ResponseLogits(build_model(STUDENT, processor.tokenizer, seed=0).eval())
    clip, rng = make_clip(), np.random.default_rng(0)
    shape = (len(clip.frame_indices), *clip.frame_size, 3)
    videos = [rng.integers(0, 256, shape, np.uint8) for _ in range(3)]
    asked = [replace(make_prompt("p"), clip=clip, query=f"query {i}") for i in range(2)]
    prompts = [encoder.encode(p, frames=frames) for frames in videos for p in asked]
    cut = []

    def counting(frames, patching, cut_of=video_opd.models.patches._cut):
        cut.append(frames.shape)
        return cut_of(frames, patching)

    monkeypatch.setattr(video_opd.models.patches, "_cut", counting)
    responses, cache = [np.arange(3, dtype=np.int32)] * 4, VisionCache(logits_of.model, 1 << 20)
    for chosen, new in ((prompts[:4], 2), (prompts[2:], 1), (prompts[:4], 0)):
        expected = logits_of(collate(chosen, responses, pad_id=0))
        cut.clear()
        batch = collate(chosen, responses, pad_id=0, with_pixels=False)
        shown = [chosen[i] for i in batch.clips]
        batch = replace(batch, video_features=cache.features(shown, batch.video_grid_thw))
        assert len(cut) == new
        torch.testing.assert_close(logits_of(batch), expected, rtol=0, atol=1e-5)
    assert cache.take_metrics() == {"learner/vision_cache_hit_frac": 1 - 3 / 6}
