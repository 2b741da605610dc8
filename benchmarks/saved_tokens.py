"""What trees save on annotated videos: tokens of a pass over all prompts of a video, and over each alone.

`python -m benchmarks.saved_tokens ANNOTATIONS ... [--lengths CSV]`. Reads any format of docs/data.md. All
prompts of a video are in one step; a tree has at most 32 branches; a prompt has 8,000 video tokens, which
prompts share, and 60 others, and a response 40. With several rollouts a prompt each of them is a branch. The
last line is one JSON object.
"""

import argparse
from collections import Counter
from collections.abc import Iterable

from benchmarks.command import Row, print_result
from video_opd.config_data import DatasetConfig
from video_opd.datasets.formats import read_annotations, resolve

VIDEO, OTHERS, RESPONSE = 8000, 60, 40  # tokens
MOST_BRANCHES = 32  # of a tree
ROLLOUTS = (1, 8)


def queries_per_video(annotations: str, lengths: str | None = None) -> list[int]:
    """Raises DataError for a file that cannot be read."""
    name = {"format": "charades_sta", "lengths": lengths} if annotations.endswith(".txt") else {"format": "auto"}
    dataset = resolve(DatasetConfig(annotations=annotations, videos=".", **name))
    return list(Counter(annotation.video for annotation in read_annotations(dataset)).values())


def computed_share(queries: Iterable[int], rollouts: int) -> float:
    """Tokens that trees compute over those of all sequences apart. queries: of each video."""
    branch = OTHERS + RESPONSE
    branches = [count * rollouts for count in queries]
    computed = sum(-(-n // MOST_BRANCHES) * VIDEO + n * branch for n in branches)
    return computed / (sum(branches) * (VIDEO + branch))


def share_of(annotations: str, lengths: str | None) -> Row:
    """The row of one file."""
    queries = queries_per_video(annotations, lengths)
    row: Row = {"file": annotations.rpartition("/")[2], "videos": len(queries), "queries": sum(queries)}
    row |= {"queries_a_video": sum(queries) / len(queries), "most": max(queries)}
    return row | {f"computed_at_{n}_rollouts": computed_share(queries, n) for n in ROLLOUTS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved_tokens", description=__doc__)
    parser.add_argument("annotations", nargs="+", help="annotation files")
    parser.add_argument("--lengths", metavar="CSV", help="of Charades-STA's videos: columns id and length")
    arguments = parser.parse_args()
    rows = [share_of(path, arguments.lengths) for path in arguments.annotations]
    title = f"{VIDEO:,} video tokens, {OTHERS} others, a response of {RESPONSE}, {MOST_BRANCHES} branches a tree"
    print_result({"rows": rows}, title, rows)


if __name__ == "__main__":
    main()
