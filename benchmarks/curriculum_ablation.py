"""TVDF, its halves and SCC against uniform sampling, at equal teacher-scored tokens, on spoiled data.

Some training labels are wrong, and on some training clips the teacher is bad. The evaluation split is the
demo's own. `python -m benchmarks.curriculum_ablation [--quick]`. The last line is one JSON object.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import launch
from benchmarks.command import Row, append_row, by_kind, in_new_process, make_parser, print_result, spread
from demo.clips import SPLIT_FILES, ensure_clips
from video_opd.config_file import load_demo

LEVELS, SPOIL_FRAC, NUM_CLIPS = ("colour", "shape", "faint"), 0.3, 1200
GROUPS, ROUND_STEPS, NUM_ROUNDS, PASSES = 64, 12, 3, 2
TOKENS_A_RESPONSE = 7.0  # of the demo's answers, on average
SELECTS = ["curriculum.kind=tvdf", f"curriculum.num_selected={GROUPS * ROUND_STEPS // PASSES}"]
KINDS = {
    "uniform": ["curriculum.kind=uniform"],
    "+TRPV": [*SELECTS, "curriculum.dbtp=false"],
    "+DBTP": [*SELECTS, "curriculum.trpv=false"],
    "TVDF": SELECTS,
    "SCC": ["curriculum.kind=scc", "curriculum.scc.schedule=false"],
}
COUNTS = ("teacher_calls", "teacher_answers", "steps", "rollouts", "suspended_rollouts")  # of summary.json
SCORES = ("miou", "r1_07")
COLUMNS = (*SCORES, "scored_tokens", "teacher_calls", "rollouts", "steps", "wall_s", "select_s", "dropped")


def measure(kind: str, seed: int, out: Path, num_rounds: int, overrides: Sequence[str]) -> Row:
    """One run. Every kind ends at the same number of teacher-scored tokens; the learning rate is constant."""
    budget = int(num_rounds * ROUND_STEPS * GROUPS * TOKENS_A_RESPONSE)
    num_steps = 20 * num_rounds * ROUND_STEPS  # not reached: the budget ends the run
    data = out / "data"
    values = {f"data.{s}.{k}": data / s / name for s in ("train", "eval") for k, name in SPLIT_FILES.items()}
    values |= {"runs_dir": out / "runs", "run_name": f"{kind.strip('+')}-{seed}", "seed": seed}
    values |= {"groups_per_step": GROUPS, "max_scored_tokens": budget, "num_steps": num_steps}
    values |= {"learner.lr": "5e-4", "learner.final_lr_frac": 1, "learner.warmup_frac": 0}
    values |= {"curriculum.passes_per_round": PASSES}
    values |= {"max_policy_lag": 0}  # all that is scored is trained on: budgets are equal to within a step
    summary = launch.launch(load_demo([*(f"{k}={v}" for k, v in values.items()), *KINDS[kind], *overrides]))
    assert summary["steps"] < num_steps, f"{kind}: {num_steps} steps scored fewer than {budget} tokens"
    before, after, teacher = (summary[key]["miou"] for key in ("student_before", "student_after", "teacher"))
    row = {"kind": kind, "seed": seed, "miou": after, "r1_07": summary["student_after"]["r1@0.7"]}
    row |= {"wall_s": summary["seconds"]["train"], "select_s": summary["seconds"].get("select", 0.0)}
    row |= {"scored_tokens": summary["tokens"]["scored"], "dropped": len(summary["dropped"])}
    row |= {"miou_before": before, "teacher_miou": teacher}
    return row | {key: summary[key] for key in COUNTS}


def main() -> None:
    parser = make_parser("curriculum_ablation", __doc__, "one round and one seed", overrides=True)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    kept = "keep clips, run folders and rows.jsonl here (default: a temporary folder)"
    parser.add_argument("--out", type=Path, help=kept)
    arguments = parser.parse_args()
    seeds, rounds = (1, 1) if arguments.quick else (arguments.seeds, NUM_ROUNDS)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        ensure_clips(out / "data", LEVELS, SPOIL_FRAC, NUM_CLIPS)
        only_answers = [*arguments.overrides, "run_name=answers", "max_scored_tokens=1"]
        answers = in_new_process(measure, "+TRPV", 0, out, 1, only_answers)
        for seed in range(seeds):
            for kind in arguments.kinds:
                rows.append(in_new_process(measure, kind, seed, out, rounds, arguments.overrides))
                append_row(out / "rows.jsonl", rows[-1])
    note = (
        f"mIoU before {rows[0]['miou_before']:.3f}, teacher {rows[0]['teacher_miou']:.3f}. The teacher's own "
        f"{answers['teacher_answers']} answers took {answers['select_s']:.0f} s more, once, before all runs"
    )
    shown = [
        {"kind": kind} | {column: spread([row[column] for row in of_kind]) for column in COLUMNS}
        for kind, of_kind in by_kind(rows).items()
    ]
    title = f"mean (lowest to highest) of {seeds} seed(s), equal teacher-scored tokens"
    print_result({"rows": rows, "answers": answers}, title, shown, note)


if __name__ == "__main__":
    main()
