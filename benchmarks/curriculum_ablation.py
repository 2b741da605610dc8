"""TVDF, its halves and SCC against uniform sampling, at equal teacher-scored tokens, on spoiled data.

Some training labels are wrong, and on some training clips the teacher is bad. The evaluation split is the
demo's own. `python -m benchmarks.curriculum_ablation [--quick]`. The last line is one JSON object.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launch
from benchmarks.command import in_new_process, make_parser, print_result
from benchmarks.rows import append_row, by_kind, spread
from demo.clips import ensure_clips
from video_opd.config_file import load_demo

LEVELS, SPOIL_FRAC, NUM_CLIPS = ("colour", "shape", "faint"), 0.3, 1200
GROUPS, ROUND_STEPS, NUM_ROUNDS, PASSES = 64, 12, 3, 2
NUM_SELECTED = GROUPS * ROUND_STEPS // PASSES
TOKENS_A_RESPONSE = 7.0  # of the demo's answers, on average
FILES = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
SELECTS = ["curriculum.kind=tvdf", f"curriculum.num_selected={NUM_SELECTED}"]
KINDS = {
    "uniform": ["curriculum.kind=uniform"],
    "+TRPV": [*SELECTS, "curriculum.dbtp=false"],
    "+DBTP": [*SELECTS, "curriculum.trpv=false"],
    "TVDF": SELECTS,
    "SCC": ["curriculum.kind=scc"],
}
COLUMNS = (
    "miou",
    "r1_07",
    "scored_tokens",
    "teacher_calls",
    "rollouts",
    "steps",
    "wall_s",
    "select_s",
    "dropped",
)


def measure(kind: str, seed: int, out: Path, num_rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run. Every kind ends at the same number of teacher-scored tokens; the learning rate is constant."""
    budget = int(num_rounds * ROUND_STEPS * GROUPS * TOKENS_A_RESPONSE)
    num_steps = 20 * num_rounds * ROUND_STEPS  # not reached: the budget ends the run
    data = [
        f"data.{split}.{key}={out / 'data' / split / name}"
        for split in ("train", "eval")
        for key, name in FILES.items()
    ]
    config = load_demo(
        [
            *data,
            f"runs_dir={out / 'runs'}",
            f"run_name={kind.strip('+')}-{seed}",
            f"seed={seed}",
            f"groups_per_step={GROUPS}",
            f"max_scored_tokens={budget}",
            f"num_steps={num_steps}",
            "max_policy_lag=0",  # all that is scored is trained on, so budgets are equal to within a step
            "learner.lr=5e-4",
            "learner.final_lr_frac=1",
            "learner.warmup_frac=0",
            f"curriculum.passes_per_round={PASSES}",
            *KINDS[kind],
            *overrides,
        ]
    )
    summary = launch.launch(config)
    assert summary["steps"] < num_steps, f"{kind}: {num_steps} steps scored fewer than {budget} tokens"
    return {
        "kind": kind,
        "seed": seed,
        "miou": summary["student_after"]["miou"],
        "r1_07": summary["student_after"]["r1@0.7"],
        "wall_s": summary["seconds"]["train"],
        "select_s": summary["seconds"].get("select", 0.0),
        "scored_tokens": summary["tokens"]["scored"],
        "dropped": len(summary["dropped"]),
        "miou_before": summary["student_before"]["miou"],
        "teacher_miou": summary["teacher"]["miou"],
        **{
            key: summary[key]
            for key in ("teacher_calls", "teacher_answers", "steps", "rollouts", "suspended_rollouts")
        },
    }


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
        {"": kind} | {column: spread([row[column] for row in of_kind]) for column in COLUMNS}
        for kind, of_kind in by_kind(rows).items()
    ]
    title = f"mean (lowest to highest) of {seeds} seed(s), equal teacher-scored tokens"
    print_result({"rows": rows, "answers": answers}, title, shown, [note], width=180)


if __name__ == "__main__":
    main()
