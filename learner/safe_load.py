"""Reads checkpoint files as tensors and plain values only, so that no code in them runs.

DeepSpeed calls torch.load(weights_only=False), which unpickles anything; an environment variable of torch
overrides that. As a script, `python safe_load.py MODULE ARGUMENTS...` runs a module that way.
"""

import os
import runpy
import sys
from importlib import import_module
from pathlib import Path

ALLOWED = (  # what DeepSpeed writes beside tensors and plain values; constructing one has no effect
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def read_weights_only() -> None:
    """Makes every later torch.load of this process and its forks read with weights_only."""
    from torch.serialization import add_safe_globals

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    for name in ALLOWED:
        module, _, leaf = name.rpartition(".")
        add_safe_globals([getattr(import_module(module), leaf)])


def find_code(folder: Path) -> str | None:
    """What is wrong with the first file below `folder` that holds more than plain values; None: nothing."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        name = path.relative_to(folder)
        try:
            foreign = sorted(set(get_unsafe_globals_in_checkpoint(path)) - set(ALLOWED))
        except Exception as error:  # torch's reader raises many kinds
            return f"{name} is no file of torch.save ({type(error).__name__})"
        if foreign:
            return f"{name} would run code when it is read ({', '.join(foreign[:3])})"
    return None


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    read_weights_only()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
