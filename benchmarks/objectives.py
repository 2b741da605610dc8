"""Objectives from one start, each with its tuned learning rate, at equal prompts, seconds and rollouts.

`python -m benchmarks.objectives [--quick] [--out DIR]`. An update of each is timed alone on the machine; the
runs that learn share it, and their seconds are their updates times those. grpo samples 8 responses to a
prompt. Writes Markdown and a picture into DIR; an interrupted command goes on where it was. Experiment:
`--sweep learner.lr 5e-5 2e-4 8e-4 --kinds opd_topk grpo`. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Sequence

from benchmarks.claims import kinds, study, tables
from benchmarks.claims.reading import END, Comparison, Group, Place
from benchmarks.claims.verdicts import OBJECTIVE_CLAIMS

PICTURE = "opd_and_grpo.png"


def kinds_of(arguments: argparse.Namespace) -> list[study.Kind]:
    """Kinds that see labels once with each sort."""
    labels = arguments.labels or ["clean", "wrong"]
    return [
        (kind, of) for kind in arguments.kinds for of in (["none"] if kind in kinds.SEE_NO_LABEL else labels)
    ]


def places_of(groups: Sequence[Group]) -> dict[str, Place]:
    """Equal costs: wall seconds where the cheapest objective ends and where OPD does, and OPD's rollouts."""
    opd = [group for group in groups if group.kind in kinds.SEE_NO_LABEL]
    places = {"end": END}

    def add(name: str, axis: str, unit: str, of: Sequence[Group]) -> None:
        if of:
            where = min(group.end(axis) for group in of)
            places[name] = Place(f"at {where:,.0f} {unit}", axis, where)

    add("the cheapest ends", "wall_s", "s", groups)
    add("OPD ends", "wall_s", "s", opd)
    add("OPD's rollouts", "rollouts", "rollouts", opd)
    return places


def report(of: study.Study, found: dict, groups: Sequence[Group]) -> None:
    """Writes the fragments and the picture; prints the result."""
    comparison = Comparison(groups, places_of(groups), of.rows[of.start]["second_task"])
    claims = tables.claim_rows(OBJECTIVE_CLAIMS, comparison, "objectives")
    objectives = tables.objective_rows(comparison)
    fragments = {
        "objectives": study.setting(of, groups) + tables.markdown(objectives),
        "objectives_picture": f"![held-out mIoU against wall seconds of training]({PICTURE})\n",
        "objectives_tuning": tables.markdown(tables.tuning_rows(found)),
        "objectives_claims": tables.markdown(claims) if claims else "",
    }
    tables.draw(comparison).savefig(of.arguments.out / PICTURE, dpi=110)
    study.write(of.arguments, fragments)
    print(json.dumps({"objectives": objectives, "claims": claims}))


def main() -> None:
    quick = "opd_topk and grpo, wrong labels, two learning rates, one seed, 4 updates"
    arguments = study.make_parser("objectives", __doc__, quick, list(kinds.OBJECTIVES)).parse_args()
    if arguments.quick:
        arguments.kinds, arguments.labels, arguments.seeds = ["opd_topk", "grpo"], ["wrong"], 1
        arguments.steps, arguments.lrs = 4, arguments.lrs[:2]
    rows = study.open_rows(arguments)
    of = study.Study(arguments, rows, kinds_of(arguments), kinds.objective_overrides, lambda kind: kind, True)
    found = of.tune()
    if arguments.sweep:
        return study.sweep(of, found)
    report(of, found, of.learn(found))


if __name__ == "__main__":
    main()
