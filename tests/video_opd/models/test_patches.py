"""Patches are bit for bit those of transformers' processors, and equal frames are cut once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import video_opd.models.patches
from tests.fakes import make_prompt
from tests.processors import FAMILIES, clips_of
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import ModelError
from video_opd.models.forward import collate
from video_opd.models.patches import patches, patching_of, pixel_values
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A processor, and prompts of random frames: two of one clip, then one each of three others."""
    build, multiple = FAMILIES[request.param]
    processor, folder = build(), tmp_path_factory.mktemp("model")
    processor.save_pretrained(folder)
    encoder = PromptEncoder(folder, PromptConfig(), VideoConfig(cache_dir=str(folder / "frames")))
    rng, encoded = np.random.default_rng(0), []
    for clip in clips_of(multiple):
        frames = rng.integers(0, 256, (len(clip.frame_indices), *clip.frame_size, 3), np.uint8)
        frames.flags.writeable = False
        queries = ("one", "another") if not encoded else ("one",)
        encoded += [
            encoder.encode(replace(make_prompt("p"), clip=clip, query=q), frames=frames) for q in queries
        ]
    return processor, encoded


def by_transformers(processor, frames: np.ndarray) -> torch.Tensor:
    return processor.video_processor([frames.copy()], do_sample_frames=False)["pixel_values_videos"]


def test_patches_are_those_of_the_processor(family):
    processor, encoded = family
    patching = patching_of(processor.video_processor)
    for e in encoded:
        ours, theirs = patches(torch.tensor(e.frames), patching), by_transformers(processor, e.frames)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_every_brightness_is_normalised_to_the_last_bit(family):
    processor, _ = family
    patching = patching_of(processor.video_processor)
    side = patching.patch_size * patching.merge_size
    for first in range(0, 256, 128):
        values = np.resize(np.arange(first, first + 128, dtype=np.uint8), (2, side, side, 3))
        assert torch.equal(patches(torch.tensor(values), patching), by_transformers(processor, values))


def test_a_batch_has_the_patches_of_its_clips_in_order_and_each_once(family, monkeypatch):
    processor, encoded = family
    cut: list[torch.Size] = []

    def counting(frames, patching, cut_of=video_opd.models.patches._cut):
        cut.append(frames.shape)
        return cut_of(frames, patching)

    monkeypatch.setattr(video_opd.models.patches, "_cut", counting)
    prompts: list[EncodedPrompt] = [encoded[2], *encoded, encoded[0]]
    batch = collate(prompts, [np.zeros(1, np.int32)] * len(prompts), pad_id=0)
    assert batch.clips == (0, 1, 4, 5) and batch.videos == (0, 1, 2, 3)
    expected = torch.cat([by_transformers(processor, prompts[i].frames) for i in batch.clips])
    assert torch.equal(batch.pixel_values, expected)
    assert batch.video_grid_thw.tolist() == [list(prompts[i].video_grid_thw) for i in batch.clips]
    assert len(cut) == 4, "of seven videos"
    assert torch.equal(
        pixel_values(prompts[:3] * 2, "cpu"),
        torch.cat([by_transformers(processor, p.frames) for p in prompts[:3] * 2]),
    )
    assert torch.equal(pixel_values([encoded[0]], "cpu"), by_transformers(processor, encoded[0].frames))


def test_no_pixels_are_made_where_features_are_known(family, monkeypatch):
    monkeypatch.setattr(video_opd.models.patches, "_cut", None)
    batch = collate(family[1], [np.zeros(1, np.int32)] * len(family[1]), pad_id=0, with_pixels=False)
    assert not batch.pixel_values.numel()


@pytest.mark.parametrize("setting", ["do_normalize", "do_rescale"])
def test_a_processor_that_leaves_pixels_as_they_are_is_refused(setting):
    processor = FAMILIES["qwen3_vl"][0]().video_processor
    setattr(processor, setting, False)
    with pytest.raises(ModelError, match="does not normalise"):
        patching_of(processor)
