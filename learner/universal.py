"""Converts a checkpoint to another number of ranks, with DeepSpeed's own converter."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from learner import safe_load
from video_opd.errors import RunError

TAG = "universal"


async def convert(checkpoint: Path, output: Path, timeout_s: float) -> None:
    """Writes `output`/universal: float32 weights and Adam moments of every parameter, whole. Raises RunError.

    A process of its own does it, without ranks or an accelerator; `timeout_s` or a cancellation kills it.
    """
    command = [sys.executable, "-P", safe_load.__file__, "deepspeed.checkpoint.ds_to_universal"]
    command += [f"--input_folder={checkpoint / 'deepspeed' / 'state'}", f"--output_folder={output / TAG}"]
    command += ["--inject_missing_state", "--num_extract_workers=2", "--num_merge_workers=2"]
    failed = f"{checkpoint} cannot be converted to another learner.world_size"
    output.mkdir(parents=True)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=DEVNULL, stderr=PIPE, start_new_session=True
    )
    try:
        _, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        hint = "raise checkpoint_timeout_s, or resume with the world_size the run had"
        raise RunError(f"{failed} within {timeout_s:.0f} s: {hint}") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{failed}: {last}")
