"""The questions that files of predictions are scored on."""

import pytest

from video_opd import ROOT


@pytest.fixture
def config(split_folder) -> list[str]:
    """Arguments that make the questions those of a few real clips; the model folder need not exist."""
    files = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    data = [
        f"data.{split}.{key}={split_folder / name}"
        for split in ("train", "eval")
        for key, name in files.items()
    ]
    return ["--config", str(ROOT / "configs" / "demo.yaml"), "student=/nowhere", *data]
