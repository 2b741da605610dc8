"""Fixtures and settings that every test file shares."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import shutil
import warnings

import pytest
from hypothesis import HealthCheck, settings

import video_opd  # noqa: F401  # makes transformers importable
from demo.clips import DEFAULT_LEVELS, write_split
from video_opd.logs import log

settings.register_profile(
    "project", max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _log_as_before():
    """A role that a test starts in its own process logs in its own way: later tests' log is their own."""
    handlers, propagate, level = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def split_folder(tmp_path_factory):
    """A split of six real clips in Charades-STA layout. Read only: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("clips") / "train"
    write_split(folder, "train", 6, DEFAULT_LEVELS)
    return folder


def not_tested(what: str) -> None:
    """Leaves a test out, loudly; where CI says that nothing is left out, fails it."""
    if os.environ.get("REQUIRE_ALL_TESTS"):
        pytest.fail(f"NOT TESTED: {what}")
    warnings.warn(f"NOT TESTED: {what}", stacklevel=2)
    pytest.skip(f"NOT TESTED: {what}")


@pytest.fixture
def prometheus_tools() -> None:
    """Prometheus and promtool are there."""
    require_prometheus()


def require_prometheus() -> None:
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        not_tested("the board and Prometheus' files: install Debian's package prometheus")


# The modules that start engines, in the order in which they begin: those that take longest first.
ENGINE_MODULES = ("chaos", "live", "hosts", "launch", "stopping", "learner", "cluster")
LAST_MODULE = "teacher_pool"  # it leaves threads of Serve, which connect to the next Ray of this process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts engines and puts it first."""
    for item in items:
        if "real" in item.path.parts:
            item.add_marker("engine")

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        if "real" not in item.path.parts:
            return len(ENGINE_MODULES) + 2
        if name in ENGINE_MODULES:
            return ENGINE_MODULES.index(name)
        return len(ENGINE_MODULES) + (name == LAST_MODULE)

    items.sort(key=place)
