"""Whether this machine's GPU does all that a run needs. No weights or data are needed.

`python -m benchmarks.gpu_check [--device cpu] [--quick] [--models ...] [--only ...]`: models of random weights
at published widths and a clip at 8,192 video tokens go through the project's own engines; transformers in
float32 says what must come out. Every part has a process and a deadline of its own. The last line is one JSON
object; exit code 1 if a check failed.
"""

import sys
import tempfile

from benchmarks.command import Row, in_new_process, make_parser, print_result
from benchmarks.gpu_check.interpreter import interpret_kernels
from benchmarks.gpu_check.process import describe_device, has_gpu, run_stage
from benchmarks.gpu_check.stage import STAGES, TRANSFERS, Bench

MODELS = ("Qwen3-VL-8B-Instruct", "Qwen2.5-VL-3B-Instruct")

QUICK = {MODELS[0]: ("models", "rollout", "learner"), MODELS[1]: ("models", "teacher")}
MARKS = {True: "ok", False: "FAILED", None: "left out"}


def stages_of(model: str, is_first: bool, quick: bool, only: list[str] | None) -> list[str]:
    """With --quick each part runs for one model, and without Ray unless it is asked for."""
    if only:
        return ["models", *only]
    if quick and model in QUICK:
        return list(QUICK[model])
    return ["models", "rollout", "teacher", "learner", *(TRANSFERS if is_first else ())]


def main() -> None:
    parser = make_parser("gpu_check", __doc__, "tiny models and clips; no Ray")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="files of configs/shapes")
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), help="run these parts alone")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not in_new_process(has_gpu):
        parser.error("torch sees no GPU: use --device cpu --quick")
    if arguments.device == "cpu":
        interpret_kernels()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            bench = Bench(model, folder, arguments.device, arguments.quick)
            for stage in stages_of(model, model == arguments.models[0], arguments.quick, arguments.only):
                for row in run_stage(stage, bench):
                    rows.append(row)
                    print(f"{row['check']}: {MARKS[row['ok']]}", flush=True)
    device = in_new_process(describe_device, arguments.device)
    failed = [row for row in rows if row["ok"] is False]
    notes = [f"FAILED {row['check']}: {row['detail']}" for row in failed]
    shown = [row | {"ok": MARKS[row["ok"]]} for row in rows]
    print_result({"rows": rows, "ok": not failed} | device, f"checks on {device['device']}", shown, *notes)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
