"""Annotation files -> one manifest -> prompts. Formats and options: docs/data.md."""

from video_opd.datasets.prompts import Split, read_prompts, read_sources, read_split

__all__ = ["Split", "read_prompts", "read_sources", "read_split"]
