"""Options that other libraries must have or accept."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_data import Attention
from video_opd.errors import ConfigError
from video_opd.models.attention import missing_for

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # without it this machine is none of the nodes with GPUs
TRACKERS = {  # the packages of each; mlflow needs the last two to write where no server is
    "tensorboard": (),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
CHECK = (sys.executable, "-m", "learner.deepspeed_config")


def asked_attention(config: Config) -> Iterator[tuple[str, Attention]]:
    """(section, implementation) of each role that computes attention with transformers."""
    yield "learner", config.learner.attn_implementation
    if config.needs_teacher and config.teacher_engine == "transformers":
        yield "teacher_pool", config.teacher_pool.attn_implementation


def check_options(config: Config) -> list[str]:
    """What only the nodes can tell. Raises ConfigError for what is missing here, or DeepSpeed refuses."""
    check_trackers(config)
    check_deepspeed(config)
    unchecked = []
    for section, attention in asked_attention(config):
        if missing := missing_for(attention):
            key = f"{section}.attn_implementation={attention}"
            if NVIDIA_DRIVER.exists():
                raise ConfigError(lacks(key, missing))
            unchecked.append(f"{key}: this machine has no GPU and no {missing}; the nodes are asked")
    return unchecked


def lacks(key: str, missing: str, where: str = "this machine") -> str:
    """The message for people."""
    return f"{key} needs the package {missing}, and {where} has none: install it, or use sdpa"


def check_trackers(config: Config) -> None:
    """Raises ConfigError for a tracker whose packages are not installed here, where the driver runs."""
    for name in config.trackers:
        if missing := [package for package in TRACKERS[name] if not find_spec(package)]:
            remedy = f"pip install '.[{name}]' in the checkout, or leave it out"
            raise ConfigError(
                f"trackers names {name}, and {' and '.join(missing)} is not installed: {remedy}"
            )


def check_deepspeed(config: Config) -> None:
    """Asks DeepSpeed itself about learner.deepspeed, in a process that imports it. Raises ConfigError."""
    if not config.learner.deepspeed:
        return
    asked = config.learner.model_dump_json()
    given: dict[str, Any] = {"cwd": ROOT, "input": asked, "timeout": config.start_timeout_s}
    try:
        done = subprocess.run(CHECK, capture_output=True, text=True, **given)
    except subprocess.TimeoutExpired as late:
        raise ConfigError(
            f"learner.deepspeed: DeepSpeed's check of it took over {late.timeout:g} s"
        ) from late
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"learner.deepspeed: DeepSpeed refuses it, {last}")
