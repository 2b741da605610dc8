"""Whether this machine's GPU does all that a run needs. No weights and no data are needed.

`python -m benchmarks.gpu_check [--device cpu] [--quick] [--models NAME ...] [--only PART ...]`: models of
random weights at published widths and clips at 8,192 video tokens go through the project's own engines;
transformers in float32 says what must come out. Each part has a process and a deadline of its own. The last
line is one JSON object; exit code 1 if a check failed. See docs/hardware.md.
"""

import sys
import tempfile

from benchmarks.command import Row, in_new_process, make_parser, print_result
from benchmarks.gpu_check.interpreter import interpret_kernels
from benchmarks.gpu_check.part import PARTS, TRANSFERS, Bench
from benchmarks.gpu_check.process import describe_machine, has_gpu, import_once, run_part
from preflight.inputs import SHAPES

MODELS = ("Qwen3-VL-8B-Instruct", "Qwen2.5-VL-3B-Instruct")
QUICK = (("models", "rollout", "learner"), ("models", "teacher"))  # of the first model, of others
MARKS = {True: "ok", False: "FAILED", None: "left out"}


def parts_of(is_first: bool, quick: bool, only: list[str] | None) -> list[str]:
    """The parts for the first model, or for another one."""
    if only:
        return ["models", *only]
    if quick:
        return list(QUICK[0 if is_first else 1])
    return ["models", "rollout", "teacher", "learner", *(TRANSFERS if is_first else ())]


def run(device: str, quick: bool, models: list[str], only: list[str] | None) -> list[Row]:
    """Runs all parts in turn; says how each check ended as soon as its part has."""
    if device == "cpu":
        interpret_kernels()
        import_once()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            for name in parts_of(model == models[0], quick, only):
                for row in run_part(PARTS[name], Bench(model, folder, device, quick)):
                    print(f"{row['check']}: {MARKS[row['ok']]}", flush=True)
                    rows.append(row)
    return rows


def main() -> None:
    parser = make_parser("gpu_check", __doc__, "tiny models and clips, each part once, without Ray")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    known = sorted(path.stem for path in SHAPES.glob("*.json"))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=known, metavar="NAME")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS)[1:], metavar="PART", help="these parts alone"
    )
    asked = parser.parse_args()
    if asked.device == "cuda" and not in_new_process(has_gpu):
        parser.error("torch sees no GPU here: use --device cpu --quick")
    rows = run(asked.device, asked.quick, list(asked.models), asked.only)
    machine = in_new_process(describe_machine, asked.device)
    failed = [row for row in rows if row["ok"] is False]
    shown = [row | {"ok": MARKS[row["ok"]]} for row in rows]
    notes = [f"FAILED {row['check']}: {row['detail']}" for row in failed]
    print_result({"rows": rows, "ok": not failed} | machine, f"checks on {machine['device']}", shown, *notes)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
