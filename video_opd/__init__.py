"""Shared vocabulary of Video-OPD: types, configuration, clips, prompts and the loss-free model forward.

Importing it first makes transformers importable beside a CPU build of torch (see cpu_torch).
"""

from video_opd import cpu_torch

cpu_torch.install()

__version__ = "0.1.0"
