"""Lets transformers import beside a CPU build of torch.

Beside a CPU torch, CUDA builds of torchvision, torchaudio and torchcodec fail at import. `install` declares
the two operators that torchvision lacks and hides the others. It does nothing beside a CUDA torch.
"""

import importlib.abc
import importlib.metadata
import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[Any] = []  # a torch Library that is garbage-collected takes its declarations with it


class _DeclareTorchvisionOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before torchvision is imported; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + _SCHEMA)
            _kept_alive.append(library)


def _is_build(package: str, cpu: bool) -> bool:
    """Whether the package is installed as a CPU build, or as another."""
    try:
        return ("+cpu" in importlib.metadata.version(package)) == cpu
    except importlib.metadata.PackageNotFoundError:
        return False


def install() -> None:
    """Prepares this process; call before transformers is imported. Costs about a millisecond."""
    if not _is_build("torch", cpu=True):
        return
    for package in ("torchaudio", "torchcodec"):
        if package not in sys.modules and _is_build(package, cpu=False):
            sys.modules[package] = None  # type: ignore[assignment]  # makes `import` raise ImportError
    installed = any(isinstance(finder, _DeclareTorchvisionOperators) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and _is_build("torchvision", cpu=False) and not installed:
        sys.meta_path.insert(0, _DeclareTorchvisionOperators())
