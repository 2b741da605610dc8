"""TVDF, its halves and SCC against uniform sampling, at equal teacher-scored tokens, on a spoiled demo.

The training split has labels of which a share is wrong and clips on which the teacher is bad; the evaluation split is the
demo's own. `python -m benchmarks.curriculum_ablation [--quick]`. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import launch
from benchmarks.rows import append_row, by_kind, spread
from demo.clips import ensure_clips
from video_opd.config_file import load_demo

LEVELS, SPOIL_FRAC, NUM_CLIPS = ("colour", "shape", "faint"), 0.3, 1200
GROUPS, ROUND_STEPS, NUM_ROUNDS, PASSES = 64, 12, 3, 2
NUM_SELECTED = GROUPS * ROUND_STEPS // PASSES
TOKENS_A_RESPONSE = 7.0  # of the demo's answers, on average
FILES = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
KINDS = {
    "uniform": ["curriculum.kind=uniform"],
    "+TRPV": ["curriculum.kind=tvdf", "curriculum.dbtp=false"],
    "+DBTP": ["curriculum.kind=tvdf", "curriculum.trpv=false"],
    "TVDF": ["curriculum.kind=tvdf"],
    "SCC": ["curriculum.kind=scc"],
}


def measure(kind: str, seed: int, data: Path, runs: Path, num_rounds: int, more: list[str]) -> dict:
    """One run. Every kind ends when the teacher has scored the same number of tokens; lr is constant, so that none is cut short."""
    budget = int(num_rounds * ROUND_STEPS * GROUPS * TOKENS_A_RESPONSE)
    num_steps = 20 * num_rounds * ROUND_STEPS  # not reached: the budget ends the run
    overrides = [
        *(
            f"data.{split}.{key}={data / split / name}"
            for split in ("train", "eval")
            for key, name in FILES.items()
        ),
        f"runs_dir={runs}",
        f"run_name={kind.strip('+')}-{seed}",
        f"seed={seed}",
        f"groups_per_step={GROUPS}",
        f"max_scored_tokens={budget}",
        f"num_steps={num_steps}",
        "max_policy_lag=0",  # nothing is scored that is not trained on, so that budgets are equal to a step
        "learner.lr=5e-4",
        "learner.final_lr_frac=1",
        "learner.warmup_frac=0",
        f"curriculum.passes_per_round={PASSES}",
        *KINDS[kind],
        *([] if kind in ("uniform", "SCC") else [f"curriculum.num_selected={NUM_SELECTED}"]),
        *more,
    ]
    summary = launch.launch(load_demo(overrides))
    assert summary["steps"] < num_steps, (
        f"{kind}: the budget of {budget} scored tokens was not used up in {num_steps} steps"
    )
    return {
        "kind": kind,
        "seed": seed,
        "miou": summary["student_after"]["miou"],
        "r1_07": summary["student_after"]["r1@0.7"],
        "teacher_calls": summary["teacher_calls"],
        "wall_s": summary["seconds"]["train"],
        "select_s": summary["seconds"].get("select", 0.0),
        "scored_tokens": summary["tokens"]["scored"],
        "teacher_answers": summary["teacher_answers"],
        "steps": summary["steps"],
        "rollouts": summary["rollouts"],
        "suspended_rollouts": summary["suspended_rollouts"],
        "dropped": len(summary["dropped"]),
        "miou_before": summary["student_before"]["miou"],
        "teacher_miou": summary["teacher"]["miou"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curriculum_ablation", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values of every run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--out", type=Path, help="keep clips, run folders and rows.jsonl here (default: a temporary folder)"
    )
    parser.add_argument("--quick", action="store_true", help="one round and one seed")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    with tempfile.TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        ensure_clips(out / "data", LEVELS, SPOIL_FRAC, NUM_CLIPS)
        answers = measure(
            "+TRPV",
            0,
            out / "data",
            out / "runs",
            1,
            [*arguments.overrides, "run_name=answers", "max_scored_tokens=1"],
        )
        rows = []
        for seed in range(seeds):
            for kind in arguments.kinds:
                rounds = 1 if arguments.quick else NUM_ROUNDS
                rows.append(measure(kind, seed, out / "data", out / "runs", rounds, arguments.overrides))
                append_row(out / "rows.jsonl", rows[-1])
    columns = (
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
    table = Table(
        "", *columns, title=f"mean (lowest to highest) of {seeds} seed(s), equal teacher-scored tokens"
    )
    for kind, of_kind in by_kind(rows).items():
        table.add_row(kind, *(spread([row[column] for row in of_kind]) for column in columns))
    Console(width=180).print(table)
    print(
        f"mIoU before {rows[0]['miou_before']:.3f}, teacher {rows[0]['teacher_miou']:.3f}. Not in these times: the teacher's "
        f"{answers['teacher_answers']} own answers, generated once before, {answers['select_s']:.0f} s"
    )
    print(json.dumps({"rows": rows, "answers": answers}))


if __name__ == "__main__":
    main()
