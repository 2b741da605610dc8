"""Lets transformers import beside a CPU build of torch.

The package index serves torchvision, torchaudio and torchcodec as CUDA builds only. Beside a CPU torch
they break at import: torchvision because its C++ library cannot load and two operators it decorates are
unknown, the other two with OSError. `install` declares the two operators when torchvision is imported, and
hides the other two. It changes nothing where torch is a CUDA build or the companions are CPU builds.
"""

import importlib.abc
import importlib.metadata
import sys
from typing import Any

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[Any] = []  # a torch Library that is garbage-collected takes its declarations with it


class _DeclareTorchvisionOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before torchvision is imported; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in _OPERATORS:
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + _SCHEMA)
            _kept_alive.append(library)
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_cuda_build(package: str) -> bool:
    version = _version(package)
    return version is not None and "+cpu" not in version


def install() -> None:
    """Prepares this process; call before transformers is imported. Costs about a millisecond."""
    if "+cpu" not in (_version("torch") or ""):
        return
    for package in ("torchaudio", "torchcodec"):
        if package not in sys.modules and _is_cuda_build(package):
            sys.modules[package] = None  # type: ignore[assignment]  # makes `import` raise ImportError
    installed = any(isinstance(finder, _DeclareTorchvisionOperators) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and _is_cuda_build("torchvision") and not installed:
        sys.meta_path.insert(0, _DeclareTorchvisionOperators())
