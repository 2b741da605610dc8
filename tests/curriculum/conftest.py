"""A configuration that several files of tests change."""

from pathlib import Path

import numpy as np
import pytest

from video_opd.config import Config
from video_opd.config_file import load_config

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture
def config(split_folder, tmp_path) -> Config:
    """A teacher's folder of our own, so that it can be changed."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(6 << 20))
    names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    return load_config(
        DEMO, [f"teacher={teacher}", *(f"data.train.{k}={split_folder / v}" for k, v in names.items())]
    )
