"""Shared vocabulary of Video-OPD: types, configuration, clips, prompts and the loss-free model forward.

Importing it first makes transformers importable beside a CPU build of torch (see cpu_torch), and lets a process start
sooner: torch, transformers and vLLM make a million objects that stay, and the garbage collector
would go through them again and again.
"""

import gc
from pathlib import Path

from video_opd.models import cpu_torch

cpu_torch.install()
gc.set_threshold(50_000, 10, 10)

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or site-packages: the folder of the packages and of configs/ and demo/."""

__version__ = "0.1.0"
