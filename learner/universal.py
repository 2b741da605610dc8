"""Converts a checkpoint to another number of ranks, with DeepSpeed's own converter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from learner import safe_load
from video_opd.errors import RunError

TAG = "universal"


def convert(checkpoint: Path, output: Path, timeout_s: float) -> None:
    """Writes `output`/universal: float32 weights and Adam moments of every parameter, whole. Raises RunError.

    A process of its own does it, without ranks or an accelerator, and is killed after `timeout_s`.
    """
    command = [sys.executable, "-P", safe_load.__file__, "deepspeed.checkpoint.ds_to_universal"]
    command += [f"--input_folder={checkpoint / 'deepspeed' / 'state'}", f"--output_folder={output / TAG}"]
    command += ["--inject_missing_state", "--num_extract_workers=2", "--num_merge_workers=2"]
    failed = f"{checkpoint} cannot be converted to another learner.world_size"
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
        hint = "raise start_timeout_s, or resume with the world_size the run had"
        raise RunError(f"{failed} within {timeout_s:.0f} s: {hint}") from None
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{failed}: {last}")
