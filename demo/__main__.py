"""`python -m demo clips` and `gaps` write clips, `python -m demo pretrain` trains the demo's models."""

import argparse
from pathlib import Path

from demo import pretrain
from demo.clips import DEFAULT_LEVELS, LEVELS, SPLIT_CLIPS, ensure_clips
from demo.gaps import SPLITS, ensure_gaps, mixture, overrides

HERE = Path(__file__).parent


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips", help="write the train and eval clips that are missing")
    add = clips.add_argument
    add("--out", type=Path, default=HERE / "data", help="folder of the splits")
    add("--levels", nargs="+", choices=LEVELS, default=DEFAULT_LEVELS, help="of the training clips, in turn")
    add("--spoil", type=_share, default=0.0, metavar="SHARE", help="share of wrong labels in training clips")
    add("--num-train", type=int, default=SPLIT_CLIPS["train"], help="number of training clips")
    gaps = commands.add_parser("gaps", help="write pool and splits on which the start lacks skills")
    gaps.add_argument("--out", type=Path, default=HERE / "data" / "gaps", help="folder of the splits")
    models = commands.add_parser("pretrain", help="train teacher, student and start from seeds")
    models.add_argument("names", nargs="*", default=list(pretrain.RECIPES), help="models to train")
    models.add_argument("--out", type=Path, default=HERE / "models", help="folder of the model folders")
    models.add_argument("--data", type=Path, default=HERE / "data", help="folder of the clips")
    arguments = parser.parse_args()
    if arguments.command == "pretrain":
        pretrain.pretrain(arguments.names, arguments.out, arguments.data)
        return
    if arguments.command == "gaps":
        ensure_gaps(arguments.out)
        for split in SPLITS:
            print(f"{split}: {mixture(arguments.out / split)}")
        print("python launch.py", *overrides(arguments.out, "wrong", "validation"))
        return
    asked = (tuple(arguments.levels), arguments.spoil, arguments.num_train)
    if arguments.out == clips.get_default("out") and asked != (DEFAULT_LEVELS, 0.0, SPLIT_CLIPS["train"]):
        parser.error("the default folder holds launch.py's own clips: name another folder with --out")
    written = ensure_clips(arguments.out, *asked)
    print(f"wrote {', '.join(written)}" if written else f"{arguments.out} is complete")


if __name__ == "__main__":
    main()
