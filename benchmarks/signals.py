"""Signals beside the teacher: each option against its objective alone, at equal prompts.

`python -m benchmarks.signals [--quick] [--out DIR]`, in the folder of the repository. The learning rate is
the one that the objective's trials on the validation split give; benchmarks.objectives with the same DIR has
the same trials. Writes Markdown into DIR; an interrupted command goes on where it was. The last line is one
JSON object.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.claims import kinds, study, tables
from benchmarks.claims.reading import Group, difference
from benchmarks.command import spread

LOSSES = {"opd": "kind: opd, clamp: 3, center: batch", "opd_topk": "kind: opd_topk, top_k: 32, clamp: 3"}
SEEDS = 3
TEACHER, START = "model: demo/models/teacher", "model: demo/models/start"


def loss_of(base: str, keys: str) -> str:
    """The override of an objective with these keys beside its own, or with others in their place."""
    own = keys if keys.startswith("kind") else ", ".join(filter(None, (LOSSES[base], keys)))
    return f"loss={{{own}}}"


class Option(NamedTuple):
    """An option of one objective: where it is from, when to use it, a metric of its own, and its keys."""

    base: str
    source: str
    use: str
    metric: str  # in metrics.jsonl: see benchmarks.signal_moves
    loss: str = ""  # keys beside the objective's, or with `kind` in place of them
    teachers: tuple[str, ...] = ()  # instead of the one teacher
    control: str | None = ""  # keys of a run without the option's effect; None: it has no such metric

    @property
    def overrides(self) -> tuple[str, ...]:
        values = (loss_of(self.base, self.loss),)
        if self.teachers:
            values += ("teacher=null", f"teachers=[{', '.join(f'{{{keys}}}' for keys in self.teachers)}]")
        return values


OPTIONS: dict[str, Option] = {
    "task reward": Option(
        "opd",
        "GRPO, arXiv 2402.03300, and its users",
        "there are labels, and the teacher is not much better than the student",
        "actors/miou",
        "task_weight: 0.5",
    ),
    "task reward, gated": Option(
        "opd",
        "ours, after SCC's gate",
        "the same; what the student already solves shall not move towards the teacher",
        "learner/reverse_kl",
        "task_weight: 0.5, task_gate: 0.7",
        control="task_weight: 0.5",
    ),
    "fixed advantage": Option(
        "opd",
        "OPSA, arXiv 2608.31046",
        "a control: if it ties, what you see is not distillation",
        "actors/miou",
        "kind: opd, fixed_advantage: -1.0",
    ),
    "signed teachers": Option(
        "opd",
        "G-OPD, arXiv 2602.12125",
        "the teacher was trained from a base that you have: go beyond it",
        "learner/reverse_kl",
        teachers=(f"name: teacher, {TEACHER}, weight: 1.25", f"name: base, {START}, weight: -0.25"),
        control=None,
    ),
    "demonstrations": Option(
        "opd_topk",
        "GKD, arXiv 2306.13649",
        "the student's own answers are still poor, and labels are good",
        "learner/demonstration_nll",
        "on_policy_frac: 0.75",
        control=None,
    ),
    "visual advantage": Option(
        "opd_topk",
        "VA-OPD, arXiv 2605.21924",
        "the student answers without looking: its score on grey frames is high",
        "learner/visual_advantage",
        "visual_weight: 0.5",
        control="visual_weight: 0.286",  # 2 of the demo's 7 tokens: all weights are 1
    ),
    "forward KL where unsure": Option(
        "opd_topk",
        "arXiv 2603.07079",
        "the student becomes surer than its teacher: entropy falls early",
        "learner/entropy",
        "forward_kl_entropy: 0.3",
    ),
    "student's top-K": Option(
        "opd_topk",
        "ours",
        "the student puts mass on tokens that are not among the teacher's K",
        "learner/reverse_kl",
        "top_k_of: student",
    ),
    "Jensen-Shannon": Option(
        "opd_topk",
        "GKD, arXiv 2306.13649",
        "the reverse KL is unstable; it needs no clamp",
        "learner/reverse_kl",
        "kind: opd_topk, top_k: 32, divergence: jsd",
    ),
    "self-teacher, crop": Option(
        "opd_topk",
        "ours; self-distillation with privileged views",
        "there is no larger teacher, and labels say where to look",
        "learner/reverse_kl",
        teachers=(f"name: self, {START}, crop_margin_frac: 0.5",),
        control=None,
    ),
    "self-teacher, crop, following": Option(
        "opd_topk",
        "the same",
        "the same, in a long run: the frozen start would hold the student back",
        "learner/reverse_kl",
        teachers=(f"name: self, {START}, crop_margin_frac: 0.5, follows: student, delay: 4",),
        control=None,
    ),
}


def overrides(kind: str, steps: int) -> tuple[str, ...]:
    """Of an option, or of an objective alone."""
    return kinds.objective_overrides(kind, steps) if kind in LOSSES else OPTIONS[kind].overrides


def rows_of(groups: Sequence[Group]) -> list[dict[str, str]]:
    """A row for each option; differences are of the same seeds."""
    of_kind = {group.kind: group for group in groups}
    rows = []
    for name, option in ((name, OPTIONS[name]) for name in of_kind if name in OPTIONS):
        group, base = of_kind[name], of_kind[option.base]
        keys = [option.loss, *(f"teachers: {{{keys}}}" for keys in option.teachers)]
        rows.append(
            {
                "option": name,
                "source": option.source,
                "when to use it": option.use,
                "keys": " ".join(f"`{text}`" for text in keys if text),
                "beside": f"`{option.base}`",
                "mIoU": spread(list((group.read("miou") or {}).values())),
                "less the objective alone": str(
                    difference(group.read("miou") or {}, base.read("miou") or {})
                ),
            }
        )
    return rows


def report(of: study.Study, groups: Sequence[Group]) -> None:
    """Writes the fragment; prints the result."""
    signals = rows_of(groups)
    alone = [group for group in groups if group.kind in LOSSES]
    scores = [
        f"`{g.kind}` alone, learning rate {g.lr:g}: mIoU {tables.read(g, 'miou', tables.END)}" for g in alone
    ]
    text = f"{'. '.join(scores)}. {study.setting(of, groups)}{tables.markdown(signals)}"
    study.write(of.arguments, {"signals": text})
    print(json.dumps({"signals": signals}))


def main() -> None:
    quick = "the first option, one learning rate and seed, 4 updates"
    arguments = study.make_parser("signals", __doc__, quick, list(OPTIONS), SEEDS).parse_args()
    if arguments.quick:
        arguments.kinds, arguments.seeds, arguments.steps = arguments.kinds[:1], 1, 4
        arguments.lrs = arguments.lrs[:1]
    bases = dict.fromkeys(OPTIONS[kind].base for kind in arguments.kinds)
    labels = (arguments.labels or ["clean"])[0]
    wanted = [*((base, labels) for base in bases), *((kind, labels) for kind in arguments.kinds)]

    def tuned_as(kind: study.Kind) -> study.Kind:
        return (kind[0] if kind[0] in LOSSES else OPTIONS[kind[0]].base, "none")

    of = study.Study(arguments, study.open_rows(arguments), wanted, overrides, tuned_as, False)
    found = of.tune()
    if arguments.sweep:
        return study.sweep(of, found)
    report(of, of.learn(found))


if __name__ == "__main__":
    main()
