"""An encoding says what the processor's own call says, without computing with a pixel."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import make_clip, make_prompt
from tests.processors import FAMILIES, clips_of
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import DataError, ModelError
from video_opd.models.prompting import PromptEncoder, chat_messages, video_metadata
from video_opd.types import Clip, Prompt

CONFIGS = [PromptConfig(), PromptConfig(template="Say when: {query}.", video_first=False)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[Any, list[PromptEncoder], list[Clip]]:
    """A processor, an encoder for each of CONFIGS, and clips."""
    build, multiple = FAMILIES[request.param]
    processor, folder = build(), tmp_path_factory.mktemp("model")
    processor.tokenizer._tokenizer.enable_truncation(7)
    processor.tokenizer._tokenizer.enable_padding(length=1000)
    processor.save_pretrained(folder)
    video = VideoConfig(cache_dir=str(folder / "frames"))
    return processor, [PromptEncoder(folder, config, video) for config in CONFIGS], clips_of(multiple)


def prompts_of(clips: list[Clip]) -> list[Prompt]:
    queries = ("the red square is visible", "", "ein <0.5 seconds> Mann — 开门", "When? " * 300)
    return [replace(make_prompt(q), clip=clip, query=q) for q in queries for clip in clips]


def noise(clip: Clip) -> np.ndarray:
    shape = (len(clip.frame_indices), *clip.frame_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def whole_call(processor, config: PromptConfig, prompt: Prompt, frames: np.ndarray) -> dict[str, np.ndarray]:
    messages = chat_messages(config, prompt.query)
    return processor(
        text=[processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)],
        videos=[frames],
        video_metadata=[video_metadata(prompt.clip)],
        do_sample_frames=False,
        return_tensors="np",
    )


@pytest.mark.parametrize("blank", [False, True])
def test_ids_grid_types_and_seconds_are_those_of_the_whole_call(family, blank):
    processor, encoders, clips = family
    for config, encoder in zip(CONFIGS, encoders, strict=True):
        for prompt in prompts_of(clips):
            ours = encoder.encode(prompt, blank, frames=noise(prompt.clip))
            theirs = whole_call(processor, config, prompt, ours.frames)
            assert ours.token_ids.dtype == ours.token_types.dtype == np.int32
            np.testing.assert_array_equal(ours.token_ids, theirs["input_ids"][0])
            np.testing.assert_array_equal(ours.token_types, theirs["mm_token_type_ids"][0])
            np.testing.assert_array_equal(ours.video_grid_thw, theirs["video_grid_thw"][0])
            assert ours.second_per_grid == theirs.get("second_per_grid_ts", [None])[0]


def test_no_encoding_computes_with_pixels(family, monkeypatch):
    """torch is asked for nothing of the frames' size."""
    _, (encoder, _), clips = family
    shown = []
    process = encoder._processor.video_processor._preprocess

    def watched(videos, **options):
        shown.extend(videos)
        return process(videos, **options)

    monkeypatch.setattr(encoder._processor.video_processor, "_preprocess", watched)
    encoder._video_text.cache_clear()
    for prompt in prompts_of(clips):
        encoder.encode(prompt, frames=noise(prompt.clip))
    assert len(shown) == len(clips), "a clip's place in the text is made once for all its prompts"
    assert all(video.device == torch.device("meta") for video in shown)


def test_threads_encode_as_one_does(family):
    """transformers unsets truncation and padding at a call, which fails while a thread uses the tokenizer."""
    _, (encoder, _), clips = family
    tokenizer = encoder.tokenizer._tokenizer
    assert (tokenizer.truncation, tokenizer.padding) == (None, None), "set before any thread"
    prompts = [replace(p, query=f"{p.query} {i}") for i, p in enumerate(prompts_of(clips) * 4)]
    frames = {id(clip): noise(clip) for clip in clips}
    alone = [encoder.encode(p, frames=frames[id(p.clip)]).fingerprint for p in prompts]
    encoder._video_text.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda p: encoder.encode(p, frames=frames[id(p.clip)]), prompts))
    assert [e.fingerprint for e in together] == alone


@pytest.mark.parametrize("build", [build for build, _ in FAMILIES.values()], ids=FAMILIES)
@pytest.mark.parametrize(("name", "value"), [("shortest_edge", 1 << 22), ("longest_edge", 1 << 10)])
def test_frames_that_the_processor_would_resize_are_refused_in_one_line(build, name, value, tmp_path):
    build().save_pretrained(tmp_path)
    (path,) = (p for p in tmp_path.glob("*processor_config.json") if "video_processor" in p.read_text())
    settings = json.loads(path.read_text())
    settings.get("video_processor", settings)["size"][name] = value
    path.write_text(json.dumps(settings))
    encoder = PromptEncoder(tmp_path, PromptConfig(), VideoConfig(cache_dir=str(tmp_path / "frames")))
    clip = replace(make_clip(), frame_size=(224, 224))
    with pytest.raises(ModelError, match=f"clip {clip.clip_id}: the processor resizes") as caught:
        encoder.encode(replace(make_prompt("p"), clip=clip), frames=noise(clip)[:0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("query", ["a <|video_pad|>", "an <|image_pad|>"])
def test_a_query_that_holds_a_pad_is_refused_in_one_line(family, query):
    _, encoders, clips = family
    for encoder in encoders:
        with pytest.raises(DataError, match="prompt p: its text has") as caught:
            encoder.encode(replace(make_prompt("p"), clip=clips[0], query=query), frames=noise(clips[0]))
        assert "\n" not in str(caught.value)


def test_blank_videos_have_a_digest_of_their_own(family):
    _, (encoder, _), clips = family
    digests = {
        encoder.encode(replace(make_prompt("p"), clip=clip), blank, frames=noise(clip)).frames_digest
        for clip in clips
        for blank in (False, True)
    }
    assert len(digests) == 2 * len(clips)
