"""Shared by all rooms: types, configuration, clips, prompts, models, files.

Import it first: it makes transformers importable beside a CPU build of torch (see cpu_torch), and garbage
collection rare, since torch, transformers and vLLM create a million objects that would be scanned repeatedly.
Ray and vLLM send their makers no statistics unless the environment asks for it.
"""

import gc
import os
from pathlib import Path

from video_opd.models import cpu_torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
cpu_torch.install()
gc.set_threshold(50_000, 10, 10)

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or site-packages: the parent of configs/, demo/ and the packages."""

__version__ = "0.1.0"
