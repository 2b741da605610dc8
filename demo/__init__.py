"""The embedded demo: synthetic grounding clips as real mp4 files, and a tiny teacher and student."""

import video_opd  # noqa: F401  # first: makes transformers importable
