"""make gpu-check: what it says of checks that end badly, and its configs for GPUs."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu_check.__main__ import MODELS
from benchmarks.gpu_check.part import TRANSFERS, Bench, Part
from benchmarks.gpu_check.process import PROCESSES, run_part


def rows_of(tmp_path: Path, deadline_s: float, *checks: str) -> dict[str, tuple[bool | None, str]]:
    part = Part("broken", "tests.benchmarks.broken_part", checks)
    rows = run_part(part, Bench("model", str(tmp_path), "cpu", True), deadline_s)
    assert [row["check"] for row in rows] == [f"model broken {check.replace('_', ' ')}" for check in checks]
    return {check: (row["ok"], row["detail"]) for check, row in zip(checks, rows, strict=True)}


def test_a_check_that_fails_leaves_the_others_and_one_that_crashes_ends_its_process(tmp_path, capfd):
    checks = ("passes", "finds", "raises", "does_not_apply", "crashes", "hangs")
    rows = rows_of(tmp_path, 120, *checks)
    assert rows["passes"] == (True, "all is well")
    assert rows["finds"] == (False, "0.3 from float32's")
    assert rows["raises"] == (False, "ValueError: a first line")
    assert rows["does_not_apply"] == (None, "needs a GPU")
    assert rows["crashes"] == (False, "its process ended with code -6; the last line: the last words")
    assert rows["hangs"] == rows["crashes"], "it was never come to"
    assert "a second line" in capfd.readouterr().out, "the end of the process's log is shown"


def test_without_the_first_check_none_can_run(tmp_path):
    rows = rows_of(tmp_path, 120, "finds", "passes")
    assert rows["passes"] == (False, "not run, since finds failed")


def test_a_check_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    process, started = PROCESSES.Process, tmp_path / "child"
    join = process.join

    def join_until_it_hangs(self, timeout: float | None = None) -> None:
        join(self, None) if timeout is None else wait_until(started.exists)

    monkeypatch.setattr(process, "join", join_until_it_hangs)
    rows = rows_of(tmp_path, 7, "passes", "hangs")
    assert rows["passes"][0] and rows["hangs"] == (False, "no end within 7 s; the last line: none")
    sleeper = int(started.read_text())
    wait_until(lambda: not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == "zombie")


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came true")


def test_a_part_that_cannot_be_imported_is_a_failure(tmp_path):
    rows = run_part(Part("gone", "tests.nowhere", ("a", "b")), Bench("model", str(tmp_path), "cpu", True))
    assert [row["ok"] for row in rows] == [False, False]
    assert "No module named 'tests.nowhere'" in rows[0]["detail"]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    from benchmarks.gpu_check import __main__ as command

    monkeypatch.setattr(command, "in_new_process", lambda *_: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("torch sees no GPU here: use --device cpu --quick")
    )


@pytest.mark.engine  # imports transformers
@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu_every_part_has_a_config_whose_memory_is_planned(model, tmp_path):
    from benchmarks.gpu_check.models import LAYERS, make_config
    from benchmarks.gpu_check.transfer import overrides_for
    from preflight.inputs import make_draft
    from preflight.memory_fit import memory_plan, misfit

    bench = Bench(model, str(tmp_path), "cuda", False)
    plan = memory_plan(config := make_config(bench), make_draft(config), 80)
    on_gpu = {role.role for role in plan.roles if role.device}
    assert on_gpu == {"learner", "actors", "teacher"} and config.rollout.dtype == "bfloat16"
    text, vision = plan.student.text, plan.student.vision
    shallow = replace(
        plan.student,
        text=replace(text, layers=LAYERS["text"]),
        vision=replace(vision, depth=LAYERS["vision"]),
    )
    for way in TRANSFERS:
        config = make_config(bench, *overrides_for(way, "cuda"))
        here = replace(plan, config=config, student=shallow, teacher=shallow)
        assert config.learner.weight_transfer == way
        assert not [problem for role in here.roles if (problem := misfit(here, role))]


@pytest.mark.engine  # imports transformers
def test_measured_seconds_stand_beside_those_that_are_planned_for_this_gpu(tmp_path, monkeypatch):
    from benchmarks.gpu_check.measure import planned
    from benchmarks.gpu_check.models import make_config

    config = make_config(Bench(MODELS[0], str(tmp_path), "cuda", False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = {}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda of=name: of)
        told[name] = planned(config, lambda plan: plan.phases["update"].seconds)
    *known, unknown = told.values()
    seconds = [float(words.removeprefix("planned ")) for words in known]
    assert 0.1 < seconds[0] < 0.5 * seconds[1] and unknown == "no plan for NVIDIA GeForce RTX 4090"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planned(config, lambda plan: plan.step_s) == "no plan on a CPU"


@pytest.mark.engine  # imports transformers
def test_the_float32_pass_repeats_key_heads_since_no_gpu_kernel_takes_fewer(monkeypatch):
    from transformers import AutoModelForImageTextToText

    from benchmarks.gpu_check.measure import with_as_many_keys
    from benchmarks.gpu_check.models import model_config
    from preflight.inputs import SHAPES
    from video_opd.models.model_files import read_json

    ids = {
        "<|im_end|>": 1,
        "<|image_pad|>": 2,
        "<|video_pad|>": 3,
        "<|vision_start|>": 4,
        "<|vision_end|>": 5,
    }
    config = model_config(read_json(SHAPES / f"{MODELS[0]}.json"), True, ids)
    model, heads = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noting(query, key, value, **options):
        heads.append((query.shape[1], key.shape[1], bool(options.get("enable_gqa"))))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    words = torch.arange(10, 20)[None]
    with torch.no_grad():
        grouped = model.model(input_ids=words).last_hidden_state
        assert set(heads) == {(2, 1, True)}
        heads.clear()
        repeated = with_as_many_keys(model.model.forward)(input_ids=words).last_hidden_state
    assert set(heads) == {(2, 2, False)}
    assert torch.allclose(grouped, repeated, atol=1e-5)
