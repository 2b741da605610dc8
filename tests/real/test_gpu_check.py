"""make gpu-check on a CPU: the same checks on tiny models, vLLM on the model runner that GPUs use."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu_check.__main__ import MODELS, parts_of
from benchmarks.gpu_check.part import PARTS
from video_opd import ROOT


@pytest.fixture(scope="module")
def quick() -> tuple[int, dict]:
    """Exit code and result of the command, on the second model runner of vLLM with interpreted kernels."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    *shown, last = done.stdout.splitlines() or [""]
    assert last.startswith("{"), done.stderr[-3000:]
    print("\n".join(shown))
    return done.returncode, json.loads(last)


def test_every_check_passes_on_a_cpu_but_those_of_memory_which_are_left_out(quick):
    code, result = quick
    assert (code, result["ok"]) == (0, True), result["rows"]
    expected = [
        f"{model} {name} {check}".replace("_", " ")
        for model in MODELS
        for name in parts_of(model == MODELS[0], True, None)
        for check in PARTS[name].checks
    ]
    assert [row["check"] for row in result["rows"]] == expected
    assert all(row["ok"] or "memory" in row["check"] for row in result["rows"])
    assert all(row["seconds"] >= 0 and row["detail"] for row in result["rows"])


def test_vllm_ran_on_the_model_runner_of_gpus_and_scored_given_tokens_with_cached_prompts(quick):
    details = {row["check"].removeprefix(MODELS[0]).strip(): row["detail"] for row in quick[1]["rows"]}
    assert details["rollout start"].startswith("second model runner")
    assert "with up to 128 tokens of a prompt cached" in details["rollout given tokens"]
