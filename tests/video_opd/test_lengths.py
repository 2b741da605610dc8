"""Lengths of prompts before a start are those that the processors give; what does not fit is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from demo.models import build_processor
from tests.fakes import make_prompt
from tests.processors import FAMILIES, clips_of
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.config_file import load_demo
from video_opd.errors import DataError, ModelError
from video_opd.models.lengths import Limit, PromptLengths, limits, too_long
from video_opd.models.prompting import PromptEncoder

QUERIES = (
    "the red square is visible",
    "",
    "ein <0.5 seconds> Mann öffnet — 开门 — die Tür\n\n  twice?",
    "ends <|im_end|> itself<",
    "When? " * 739,
)


@pytest.mark.parametrize("video_first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_is_as_long_as_its_encoding(family, video_first, tmp_path):
    build, multiple = FAMILIES[family]
    build().save_pretrained(tmp_path)
    config = PromptConfig(template="Say when: {query}.", video_first=video_first)
    encoder = PromptEncoder(tmp_path, config, VideoConfig(cache_dir=str(tmp_path / "frames")))
    clips = [clip for clip in clips_of(multiple) for _ in QUERIES]
    prompts = [
        replace(make_prompt(f"p{i}"), clip=clip, query=QUERIES[i % len(QUERIES)])
        for i, clip in enumerate(clips)
    ]
    counted = PromptLengths(tmp_path, family, multiple, config).of(prompts)
    blanks = (np.zeros((len(c.frame_indices), *c.frame_size, 3), np.uint8) for c in clips)
    encoded = [encoder.encode(p, frames=blank) for p, blank in zip(prompts, blanks, strict=True)]
    assert counted == [len(e.token_ids) for e in encoded]
    assert max(counted) > 739 and len(set(counted)) > len(QUERIES)


def test_counting_imports_no_framework():
    code = "import sys; from video_opd.models import lengths; lengths._compile(''); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "transformers"} & {*done.stdout.split()}


def test_a_query_that_holds_the_videos_pad_is_refused(tmp_path):
    build_processor().save_pretrained(tmp_path)
    lengths = PromptLengths(tmp_path, "qwen3_vl", 32, PromptConfig())
    with pytest.raises(DataError, match="prompt b: its query holds"):
        lengths.of([make_prompt("a"), replace(make_prompt("b"), query="a <|video_pad|>")])


def test_a_template_that_marks_what_an_assistant_says_is_read_and_a_broken_one_is_one_line(tmp_path):
    """transformers has a tag for it, which its training templates use."""
    build_processor().save_pretrained(tmp_path)
    path, config = tmp_path / "chat_template.jinja", PromptConfig()
    plain = PromptLengths(tmp_path, "qwen3_vl", 32, config).of([make_prompt("a")])
    said = "{% for message in messages if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    path.write_text(path.read_text() + said + "{% endgeneration %}{% endfor %}")
    assert PromptLengths(tmp_path, "qwen3_vl", 32, config).of([make_prompt("a")]) == plain
    path.write_text("{% for message in messages %}")
    with pytest.raises(ModelError) as caught:
        PromptLengths(tmp_path, "qwen3_vl", 32, config)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_folder_without_tokenizer_or_template_is_one_line(name, tmp_path):
    build_processor().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError) as caught:
        PromptLengths(tmp_path, "qwen3_vl", 32, PromptConfig())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ((), ("rollout.max_model_len", 256, 16)),
        (("loss.kind=sft",), None),
        (("loss.kind=sft", "curriculum.kind=tvdf"), ("rollout.max_model_len", 256, 16)),
        (("teacher_pool.engine=vllm", "loss.kind=off_policy_rkd"), ("teacher_pool.max_model_len", 256, 17)),
    ],
)
def test_prompts_are_bound_by_the_engines_that_see_them(overrides, bounds):
    config: Config = load_demo(["loss.clamp=null", *overrides])
    assert limits(config, trained=True) == ([Limit(*bounds)] if bounds else [])
    assert limits(config, trained=False)[0] == Limit("rollout.max_model_len", 256, 16), "all are evaluated on"


def test_what_does_not_fit_is_named_with_the_key_and_the_value_it_needs():
    failed = too_long(
        [make_prompt("a"), make_prompt("b")], [240, 241], [Limit("rollout.max_model_len", 256, 16)]
    )
    assert failed.keys() == {"b"}
    assert "rollout.max_model_len=256: set it to 257 or more" in failed["b"]
