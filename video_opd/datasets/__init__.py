"""Annotation files -> one manifest -> prompts. The formats are described in docs/data.md.

source.py reads text, fields.py single values, formats.py every layout (detect.py tells them apart), manifest.py the Parquet
file, videos.py finds files; prompts.py is what a run reads, check.py and convert.py are `python -m video_opd.datasets`.
"""

from video_opd.datasets.prompts import Split, read_prompts, read_split

__all__ = ["Split", "read_prompts", "read_split"]
