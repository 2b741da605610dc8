"""Fixtures and settings that every test file shares."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
from hypothesis import HealthCheck, settings

import video_opd  # noqa: F401  # makes transformers importable
from demo.clips import DEFAULT_LEVELS, write_split

settings.register_profile("project", max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def split_folder(tmp_path_factory):
    """A split of six real clips in Charades-STA layout. Read only: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("clips") / "train"
    write_split(folder, "train", 6, DEFAULT_LEVELS)
    return folder
