"""A checkpoint of one number of ranks made loadable by another, by DeepSpeed's own converter."""

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
    """At stage 0 every rank has, and the checkpoint holds, the whole optimizer: any number of ranks reads it as it is."""
    return zero_stage > 0 and saved_world_size != world_size


def convert(checkpoint: Path, output: Path, timeout_s: float) -> None:
    """Writes `output`/universal: float32 weights and Adam moments of every parameter, whole. Raises RunError.

    In a process of its own: it needs neither ranks nor an accelerator, and can be ended when it takes longer than `timeout_s`.
    """
    command = [
        sys.executable,
        "-P",
        safe_load.__file__,
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    command += [
        "--input_folder",
        str(checkpoint / "deepspeed" / "state"),
        "--output_folder",
        str(output / TAG),
    ]
    command += ["--num_extract_workers", str(_NUM_WORKERS), "--num_merge_workers", str(_NUM_WORKERS)]
    output.mkdir(parents=True)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise RunError(
            f"{checkpoint} was not converted to another learner.world_size within {timeout_s:.0f} s: raise start_timeout_s, or "
            "resume with the world_size the run had"
        ) from None
    if process.returncode:
        last = (said.strip().splitlines() or ["nothing said"])[-1]
        raise RunError(f"{checkpoint} cannot be converted to another learner.world_size: {last}")
