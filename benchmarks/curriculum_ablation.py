"""Curricula on the pool with wrong labels, with opd_topk, at equal prompts and at equal teacher tokens.

`python -m benchmarks.curriculum_ablation [--quick] [--out DIR]`. The learning rate is the one that opd_topk's
trials on the validation split give; benchmarks.objectives with the same DIR has the same trials. Curves are
read where all have seen as many prompts, and where the teacher has scored as many tokens. Writes Markdown
into DIR; an interrupted command goes on where it was. Experiment:
`--sweep curriculum.num_selected 128 256 512 --kinds TVDF TRPV`. The last line is one JSON object.
"""

import json
from collections.abc import Sequence

from benchmarks.claims import kinds, study, tables
from benchmarks.claims.case import Case
from benchmarks.claims.reading import END, Comparison, Group, Place
from benchmarks.claims.verdicts import CURRICULUM_CLAIMS

# The teacher's own answers, once: all other runs of DIR find them.
ANSWERS = Case("time", "answers", "wrong", 0, 1e-5, 1, kinds.OBJECTIVES["opd_topk"] + kinds.CURRICULA["TRPV"])
SCHEDULED = ("schedule", "SCC")  # they present fewer prompts by design


def places_of(groups: Sequence[Group]) -> dict[str, Place]:
    """The prompts and tokens at which all but the scheduled kinds can be read, and those that all reach."""
    places = {"end": END}
    others = [group for group in groups if group.kind not in SCHEDULED]

    def add(name: str, axis: str, of: Sequence[Group]) -> None:
        if of:
            where = min(row["curve"][-1][axis] for group in of for row in group.rows)
            places[name] = Place(f"at {where:,.0f} {axis.replace('_', ' ')}", axis, where)

    add("prompts", "prompts", others)
    add("tokens", "teacher_tokens", others)
    if len(others) < len(groups):
        add("fewest prompts", "prompts", groups)
        add("fewest tokens", "teacher_tokens", groups)
    return places


def report(of: study.Study, groups: Sequence[Group]) -> None:
    """Writes the fragments; prints the result."""
    comparison = Comparison(groups, places_of(groups), of.rows[of.start]["second_task"])
    claims = tables.claim_rows(CURRICULUM_CLAIMS, comparison, "curriculum_ablation")
    curricula = tables.curriculum_rows(comparison)
    asked = f"The teacher's own answers took {of.rows[ANSWERS]['select_s']:.0f} s, once, before all runs"
    note = f"Learning rate {groups[0].lr:g}. {asked}. {study.setting(of, groups)}"
    fragments = {"curricula": note + tables.markdown(curricula)}
    fragments |= {"curricula_claims": tables.markdown(claims) if claims else ""}
    study.write(of.arguments, fragments)
    print(json.dumps({"curricula": curricula, "claims": claims}))


def main() -> None:
    quick = "uniform, TVDF and SCC, one learning rate and seed, 4 updates"
    arguments = study.make_parser("curriculum_ablation", __doc__, quick, list(kinds.CURRICULA)).parse_args()
    if arguments.quick:
        arguments.kinds, arguments.seeds, arguments.steps = ["uniform", "TVDF", "SCC"], 1, 4
        arguments.lrs = arguments.lrs[:1]
    rows, labels = study.open_rows(arguments), (arguments.labels or ["wrong"])[0]
    wanted = [(kind, labels) for kind in arguments.kinds]
    of = study.Study(
        arguments, rows, wanted, kinds.curriculum_overrides, lambda _: ("opd_topk", "none"), False
    )
    found = of.tune()
    of.run([ANSWERS], jobs=1)
    if arguments.sweep:
        return study.sweep(of, found)
    report(of, of.learn(found))


if __name__ == "__main__":
    main()
