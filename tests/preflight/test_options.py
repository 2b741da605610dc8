"""What a start and a dry run refuse of options that other libraries must have or accept."""

import pytest

import launch
from preflight import options
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.errors import ConfigError
from video_opd.models import attention, forward

CONFIG = str(ROOT / "configs" / "qwen3vl_8b.yaml")
FLASH = "learner.attn_implementation=flash_attention_2"


@pytest.fixture
def has_gpu(monkeypatch, tmp_path):
    """This machine is one of those with GPUs."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(options, "NVIDIA_DRIVER", tmp_path / "version")


def test_a_dry_run_refuses_an_attention_whose_package_this_machine_with_a_gpu_lacks(has_gpu, capsys):
    assert launch.main(["--config", CONFIG, "--dry-run", FLASH]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {FLASH} needs the package flash-attn, and this machine has none: install")


def test_a_driver_without_gpus_leaves_the_question_to_the_nodes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(options, "NVIDIA_DRIVER", tmp_path / "none")
    assert launch.main(["--config", CONFIG, "--dry-run", FLASH]) == 0
    assert f"NOT CHECKED  {FLASH}: this machine has no GPU and no flash-attn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "asked"),
    [
        (FLASH, ["learner"]),
        ("teacher_pool.attn_implementation=flash_attention_3", ["teacher_pool"]),
        ("teacher_pool.engine=vllm", []),
    ],
)
def test_roles_that_compute_attention_with_transformers_are_asked(has_gpu, override, asked):
    config = load_config(CONFIG, [override])
    if not asked:
        assert options.check_options(config) == []
        assert [section for section, _ in options.asked_attention(config)] == ["learner"]
        return
    with pytest.raises(ConfigError, match=asked[0]):
        options.check_options(config)


def test_a_dry_run_asks_deepspeed_about_its_keys(capsys):
    key = "learner.deepspeed.zero_optimization.offload_optimzer.device=cpu"
    assert launch.main(["--config", CONFIG, "--dry-run", key]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: learner.deepspeed: DeepSpeed refuses it, ") and "offload_optimzer" in line


@pytest.mark.parametrize(
    ("found", "missing"), [("2.3.2", "flash-attn>=2.3.3"), ("2.8.0.post2", None), ("2.10", None)]
)
def test_an_old_package_is_as_good_as_none(monkeypatch, found, missing):
    monkeypatch.setattr(attention, "version", lambda _: found)
    monkeypatch.setattr(attention, "find_spec", lambda _: True)
    assert attention.missing_for("flash_attention_2") == missing


def test_a_model_is_not_loaded_with_a_kernel_from_the_hub_in_place_of_the_package():
    with pytest.raises(ConfigError, match="flash_attention_3 needs flash-attn-3 on this node"):
        forward.load_model(str(ROOT / "demo/models/student"), "bfloat16", attention="flash_attention_3")
