"""Shared by all rooms: types, configuration, clips, prompts, models, files.

Import it first: it makes transformers importable beside a CPU build of torch (see cpu_torch), and garbage
collection rare, since torch, transformers and vLLM create a million objects that would be scanned repeatedly.
"""

import gc
from pathlib import Path

from video_opd.models import cpu_torch

cpu_torch.install()
gc.set_threshold(50_000, 10, 10)

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or site-packages: the parent of configs/, demo/ and the packages."""

__version__ = "0.1.0"
