"""`python -m demo clips` writes the demo's clips; `python -m demo pretrain` trains its two models from seeds."""

import argparse
from pathlib import Path

from demo.clips import ensure_clips


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips", help="write the train and eval clips that are missing")
    clips.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder of the splits")
    pretrain = commands.add_parser("pretrain", help="train teacher and student from seeds")
    from demo import pretrain as pretraining

    pretraining.add_arguments(pretrain)
    arguments = parser.parse_args()
    if arguments.command == "clips":
        written = ensure_clips(arguments.out)
        print(f"wrote {', '.join(written)}" if written else f"{arguments.out} is complete")
    else:
        pretraining.pretrain(arguments.names, arguments.out, arguments.data)


if __name__ == "__main__":
    main()
