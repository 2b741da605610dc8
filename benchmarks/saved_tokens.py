"""What trees save on annotated videos: tokens of a pass over all prompts of a video, and over each alone.

`python -m benchmarks.saved_tokens ANNOTATIONS ... [--lengths CSV]`. Reads any format of docs/data.md. All
prompts of a video are in one step; a tree has at most 32 branches; a prompt has 8,000 video tokens, which
prompts share, and 60 others, and a response 40. With several rollouts a prompt each of them is a branch. The
last line is one JSON object.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.command import Row, print_result
from video_opd.cluster.command_line import exit_code_of
from video_opd.config_data import DatasetConfig
from video_opd.datasets.formats import read_annotations, resolve

VIDEO, OTHERS, RESPONSE = 8000, 60, 40  # tokens
MOST_BRANCHES = 32  # of a tree
ROLLOUTS = (1, 8)


def queries_per_clip(annotations: str, lengths: str | None = None) -> list[int]:
    """A clip is a video, or an annotated part of one. Raises DataError."""
    dataset = resolve(DatasetConfig(annotations=annotations, videos=".", format="auto"))
    if dataset.format == "charades_sta":
        dataset = dataset.model_copy(update={"lengths": lengths})
    return list(Counter((a.video, a.cut_s) for a in read_annotations(dataset)).values())


def computed_share(queries: Iterable[int], rollouts: int) -> float:
    """Tokens that trees compute over those of all sequences apart. queries: of each clip."""
    branch = OTHERS + RESPONSE
    branches = [count * rollouts for count in queries]
    computed = sum(-(-n // MOST_BRANCHES) * VIDEO + n * branch for n in branches)
    return computed / (sum(branches) * (VIDEO + branch))


def share_of(annotations: str, lengths: str | None) -> Row:
    """The row of one file."""
    queries = queries_per_clip(annotations, lengths)
    row: Row = {"file": annotations.rpartition("/")[2], "videos": len(queries), "queries": sum(queries)}
    row |= {"queries_a_video": sum(queries) / len(queries), "most": max(queries)}
    return row | {f"computed_at_{n}_rollouts": computed_share(queries, n) for n in ROLLOUTS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved_tokens", description=__doc__)
    parser.add_argument("annotations", nargs="+", help="annotation files")
    parser.add_argument("--lengths", metavar="CSV", help="of Charades-STA's videos: columns id and length")
    arguments = parser.parse_args()
    return exit_code_of(lambda: show(arguments.annotations, arguments.lengths))


def show(paths: Sequence[str], lengths: str | None) -> None:
    rows = [share_of(path, lengths) for path in paths]
    title = (
        f"{VIDEO:,} video tokens, {OTHERS} others, a response of {RESPONSE}, {MOST_BRANCHES} branches a tree"
    )
    print_result({"rows": rows}, title, rows)


if __name__ == "__main__":
    sys.exit(main())
