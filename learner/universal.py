"""Converts a checkpoint to another number of ranks, with DeepSpeed's own converter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from learner import safe_load
from video_opd.errors import RunError

TAG = "universal"
_NUM_WORKERS = 2


def needs_conversion(zero_stage: int, saved_world_size: int, world_size: int) -> bool:
    """At stage 0 the checkpoint holds the whole optimizer, which any number of ranks can read."""
    return zero_stage > 0 and saved_world_size != world_size


def convert(checkpoint: Path, output: Path, timeout_s: float) -> None:
    """Writes `output`/universal: float32 weights and Adam moments of every parameter, whole. Raises RunError.

    A process of its own does it, without ranks or an accelerator, and is killed after `timeout_s`.
    """
    options = {
        "input_folder": checkpoint / "deepspeed" / "state",
        "output_folder": output / TAG,
        "num_extract_workers": _NUM_WORKERS,
        "num_merge_workers": _NUM_WORKERS,
    }
    command = [sys.executable, "-P", safe_load.__file__, "deepspeed.checkpoint.ds_to_universal"]
    command += ["--inject_missing_state", *(f"--{name}={value}" for name, value in options.items())]
    output.mkdir(parents=True)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise RunError(
            f"{checkpoint} was not converted to another learner.world_size within {timeout_s:.0f} s: "
            "raise start_timeout_s, or resume with the world_size the run had"
        ) from None
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{checkpoint} cannot be converted to another learner.world_size: {last}")
