"""Models that an engine cannot load, or not in so many shards."""

import json
from dataclasses import replace
from typing import Any

import pytest

import launch
from preflight.inputs import SHAPES, check_student, check_teacher
from preflight.model_shapes import find_shapes
from preflight.quantization import Quantization
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.errors import ConfigError

FP8 = "Qwen3-VL-32B-Instruct-FP8"


def check(*overrides: str, teacher: str = "Qwen3-VL-32B-Instruct", block: tuple[int, int] | None = None):
    config = load_config(ROOT / "configs" / "qwen3vl_8b.yaml", [f"teacher=models/{teacher}", *overrides])
    shapes: Any = find_shapes(teacher, SHAPES)
    if block:
        shapes = replace(shapes, fp8=Quantization(block=block, kept=()))
    check_student(config, find_shapes(config.student, SHAPES))
    check_teacher(config, shapes if "Qwen2" in teacher else find_shapes(config.student, SHAPES), shapes)


VLLM = ("teacher_pool.engine=vllm",)
TRANSFORMERS = "teacher_pool.engine=transformers"


@pytest.mark.parametrize(
    ("overrides", "teacher", "block", "named"),
    [
        ((TRANSFORMERS,), FP8, None, f"teacher {FP8} is in FP8: set teacher_pool.engine=vllm"),
        ((*VLLM, "teacher_pool.num_gpus=0"), FP8, None, "is in FP8, which needs GPUs: use it in bfloat16"),
        ((*VLLM, "teacher_pool.dtype=float32"), FP8, None, "teacher_pool.dtype=bfloat16"),
        ((f"student=models/{FP8}",), FP8, None, f"student {FP8} is in FP8, which cannot be trained"),
        (
            (*VLLM, "teacher_pool.tensor_parallel=16"),
            FP8,
            None,
            "in FP8 blocks of (128, 128)): use one of 1, 2, 4, 8",
        ),
        (
            (*VLLM, "teacher_pool.tensor_parallel=4"),
            "Qwen2.5-VL-72B-Instruct",
            (128, 128),  # of 29568 / 4
            "does not divide Qwen2.5-VL-72B-Instruct",
        ),
    ],
)
def test_what_an_engine_cannot_load_is_one_line(overrides, teacher, block, named):
    with pytest.raises(ConfigError) as caught:
        check(*overrides, teacher=teacher, block=block)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "teacher"),
    [(1, FP8), (4, FP8), (8, FP8), (4, "Qwen2.5-VL-72B-Instruct-FP8-Dynamic"), (4, "Qwen2.5-VL-7B-Instruct")],
)
def test_what_vllm_can_load_passes(parts, teacher):
    check(*VLLM, f"teacher_pool.tensor_parallel={parts}", teacher=teacher)


def test_a_teacher_that_cannot_score_all_of_the_students_tokens_is_one_line():
    few, many = (find_shapes(f"Qwen2.5-VL-{size}-Instruct", SHAPES) for size in ("3B", "7B"))
    asked = "teacher=t", "loss={kind: opd_topk, top_k_of: student}"
    config = load_config(ROOT / "configs" / "qwen3vl_8b.yaml", asked)
    check_teacher(config, few, many)
    with pytest.raises(ConfigError, match="152064 embeddings of the student, and 151936 of the teacher"):
        check_teacher(config, many, few)


def test_a_dry_run_refuses_it_too(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "qwen3vl_8b.yaml")
    assert launch.main(["--config", config, "--dry-run", TRANSFORMERS, f"teacher=models/{FP8}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "set teacher_pool.engine=vllm" in line


def test_a_folder_with_fp8_is_recognised_by_its_config(tmp_path):
    tree = json.loads((SHAPES / f"{FP8}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert find_shapes(tmp_path, SHAPES).fp8 == Quantization(
        block=(128, 128), kept=("lm_head", "model.visual")
    )
