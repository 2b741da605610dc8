"""The driver: the parts of a run as its one process sees them, beside THE loop of launch.py."""

import video_opd  # noqa: F401  # first: makes transformers importable
