"""Whether each signal moves a metric of its own: 20 updates of the same 32 prompts, beside a control.

`python -m benchmarks.signal_moves [--quick] [--out DIR]`, in the folder of the repository. A control is a run
of the same seed without the option's effect, but with the metric. DIR is that of benchmarks.signals: an
interrupted command goes on where it was. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Sequence

from benchmarks.claims import study, tables
from benchmarks.claims.case import GROUPS, Case
from benchmarks.claims.reading import Scores, difference
from benchmarks.command import Row, spread
from benchmarks.signals import OPTIONS, SEEDS, Option, loss_of

STEPS = 20
LEARNING_RATE = 2e-4
SAME_PROMPTS = f"data.train.max_prompts={GROUPS}"


def cases_of(kind: str, overrides: Sequence[str], arguments: argparse.Namespace) -> list[Case]:
    """A run for each seed."""
    every = (*overrides, SAME_PROMPTS, *arguments.overrides)
    seeds = range(arguments.seeds)
    return [Case("move", kind, "clean", seed, arguments.lr, arguments.steps, every) for seed in seeds]


def control_cases(option: Option, arguments: argparse.Namespace) -> list[Case]:
    """A run of the control for each seed; empty where the option has none."""
    if option.control is None:
        return []
    return cases_of(f"{option.base} control", (loss_of(option.base, option.control),), arguments)


def quarters(rows: Sequence[Row], metric: str) -> tuple[Scores, Scores]:
    """Means over the first and over the last quarter of the updates, by seed."""
    first, last = ({row["seed"]: row["metrics"][metric][i] for row in rows} for i in range(2))
    return first, last


def row_of(name: str, rows: Sequence[Row], controls: Sequence[Row]) -> dict[str, str]:
    """The table's row of an option; a difference is of the same seeds."""
    option, control, beside = OPTIONS[name], tables.NOT_READ, tables.NOT_READ
    first, last = quarters(rows, option.metric)
    if controls:
        control = f"`{option.control}`" if option.control else f"`{option.base}` alone"
        beside = str(difference(last, quarters(controls, option.metric)[1]))
    return {
        "option": name,
        "its own metric": f"`{option.metric}`",
        "first quarter of the updates": spread(list(first.values())),
        "last quarter": spread(list(last.values())),
        "change": str(difference(last, first)),
        "control": control,
        "last quarter less the control's": beside,
    }


def main() -> None:
    quick = "the first option, one seed, 4 updates"
    parser = study.make_runs_parser("signal_moves", __doc__, quick, list(OPTIONS), SEEDS, STEPS)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate of all runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kinds, arguments.seeds, arguments.steps = arguments.kinds[:1], 1, 4
    rows = study.open_rows(arguments)
    own = {kind: cases_of(kind, OPTIONS[kind].overrides, arguments) for kind in arguments.kinds}
    controls = {kind: control_cases(OPTIONS[kind], arguments) for kind in arguments.kinds}
    every = [case for cases in (*own.values(), *controls.values()) for case in cases]
    study.run_all(sorted(every, key=lambda case: case.seed), rows, arguments.jobs, arguments.out)
    found = [
        row_of(kind, [rows[case] for case in own[kind]], [rows[case] for case in controls[kind]])
        for kind in arguments.kinds
    ]
    setting = f"{arguments.steps} updates of the same {GROUPS} prompts, learning rate {arguments.lr:g}"
    text = f"{setting}, {arguments.seeds} seed(s): mean (lowest to highest).\n\n{tables.markdown(found)}"
    study.write(arguments, {"signal_moves": text})
    print(json.dumps({"signal_moves": found}))


if __name__ == "__main__":
    main()
