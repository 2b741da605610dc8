"""The embedded default: synthetic grounding clips as real mp4 files, and a tiny teacher and student that read them."""

import video_opd  # noqa: F401  # first: makes transformers importable
