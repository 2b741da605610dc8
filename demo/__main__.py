"""`python -m demo clips` writes the demo's clips; `python -m demo pretrain` trains its two models from seeds."""

import argparse
from pathlib import Path

from demo.clips import DEFAULT_LEVELS, LEVELS, SPLIT_CLIPS, ensure_clips


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips", help="write the train and eval clips that are missing")
    clips.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "data", help="folder of the splits"
    )
    clips.add_argument(
        "--levels", nargs="+", choices=LEVELS, default=DEFAULT_LEVELS, help="of the training clips, in turn"
    )
    clips.add_argument(
        "--spoil",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of wrong labels among the training clips",
    )
    clips.add_argument("--num-train", type=int, default=SPLIT_CLIPS["train"], help="number of training clips")
    pretrain = commands.add_parser("pretrain", help="train teacher and student from seeds")
    from demo import pretrain as pretraining

    pretraining.add_arguments(pretrain)
    arguments = parser.parse_args()
    if arguments.command == "clips":
        levels = tuple(arguments.levels)
        default = (levels, arguments.spoil, arguments.num_train) == (
            DEFAULT_LEVELS,
            0.0,
            SPLIT_CLIPS["train"],
        )
        if not default and arguments.out == clips.get_default("out"):
            parser.error(
                "name another folder with --out: launch.py keeps its own clips in the default one as they are"
            )
        written = ensure_clips(arguments.out, levels, arguments.spoil, arguments.num_train)
        print(f"wrote {', '.join(written)}" if written else f"{arguments.out} is complete")
    else:
        pretraining.pretrain(arguments.names, arguments.out, arguments.data)


if __name__ == "__main__":
    main()
