"""Annotation files -> one manifest -> prompts. Formats and options: docs/data.md.

source.py reads text, fields.py values, formats.py every layout, manifest.py the Parquet file; videos.py
finds videos. prompts.py serves a run; check.py serves `python -m video_opd.datasets check | convert`.
"""

from video_opd.datasets.prompts import Split, read_prompts, read_split

__all__ = ["Split", "read_prompts", "read_split"]
