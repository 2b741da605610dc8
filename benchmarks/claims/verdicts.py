"""The paper's claims, and whether the rows show them; under which condition."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.claims.kinds import OWN
from benchmarks.claims.reading import Comparison, Difference, Group, difference

LOST = 0.01  # a drop of a score that counts as one
ONE_SEED = "one seed, no verdict"
A_FIFTH = (0.15, 0.25)


class Verdict(NamedTuple):
    """What the rows say about a claim under one condition."""

    condition: str
    seen: str
    figures: str


Judge = Callable[[Comparison], Iterator[Verdict]]


@dataclass(frozen=True)
class Claim:
    """What the paper says and where, the kinds that its command has to run, and how it is judged."""

    text: str
    source: str
    kinds: tuple[str, ...]
    judge: Judge


def order(found: Difference) -> str:
    """The verdict on "a is above b", from a - b."""
    if found.num_seeds == 1:
        return ONE_SEED
    if found.num_positive == found.num_seeds:
        return "yes" if found.apart else "yes in every seed, ranges overlap"
    if found.high < 0:
        return "no, the reverse" if found.apart else "no, the reverse in every seed, ranges overlap"
    return "level"


def with_labels(labels: str) -> str:
    return "" if labels == "none" else f"{labels} labels"


def ahead(a: str, b: str, name: str, place: str) -> Judge:
    """Kind a is above kind b in a score at a place, with each sort of labels that was run."""

    def judge(comparison: Comparison) -> Iterator[Verdict]:
        at = comparison.places[place]
        for labels, one, other in comparison.pairs(a, b):
            condition = ", ".join(filter(None, (f"{a} over {b}", with_labels(labels), at.heading)))
            first, second = one.read(name, at), other.read(name, at)
            if first is None or second is None:
                yield Verdict(condition, "not read", "a run ends before")
            else:
                found = difference(first, second)
                yield Verdict(condition, order(found), str(found))

    return judge


def takes_a_fifth(a: str, b: str) -> Judge:
    """An update of kind a takes about a fifth of the seconds of one of kind b."""

    def judge(comparison: Comparison) -> Iterator[Verdict]:
        for _, one, other in list(comparison.pairs(a, b))[:1]:
            ratio = one.mean("update_s") / other.mean("update_s")
            low, high = A_FIFTH
            seen = "yes" if low <= ratio <= high else "cheaper, by less" if high < ratio < 1 else "no"
            seen = "yes, and by more" if ratio < low else seen
            yield Verdict(f"{a} over {b}, each alone on the machine", seen, f"{ratio:.2f}")

    return judge


def forgets(kind: str, expected: bool) -> Judge:
    """Accuracy on the second task falls below the start's, or does not."""

    def judge(comparison: Comparison) -> Iterator[Verdict]:
        for group in (g for g in comparison.groups if g.kind == kind):
            found = against(group, "second_task", comparison.second_task)
            fell, kept = found.high < -LOST, found.mean >= -LOST
            seen = "in some seeds" if not fell and not kept else "yes" if fell == expected else "no"
            seen = ONE_SEED if found.num_seeds == 1 else seen
            yield Verdict(", ".join(filter(None, (kind, with_labels(group.labels)))), seen, str(found))

    return judge


def passes_its_teacher(kind: str) -> Judge:
    def judge(comparison: Comparison) -> Iterator[Verdict]:
        for group in (g for g in comparison.groups if g.kind == kind):
            found = against(group, "miou", group.mean("teacher_miou"))
            yield Verdict(f"{kind}, mIoU less the teacher's", order(found), str(found))

    return judge


def saves_tokens(a: str, b: str, place: str) -> Judge:
    """Kind a needs fewer teacher tokens than kind b at a place, and its mean mIoU is hardly below."""

    def judge(comparison: Comparison) -> Iterator[Verdict]:
        at = comparison.places[place]
        for _, one, other in comparison.pairs(a, b):
            first, second = one.read("miou", at), other.read("miou", at)
            spent, of = one.read("teacher_tokens", at), other.read("teacher_tokens", at)
            condition = f"{a} over {b}, {at.heading}"
            if first is None or second is None or spent is None or of is None:
                yield Verdict(condition, "not read", "a run ends before")
                continue
            saved, found = 1 - sum(spent.values()) / sum(of.values()), difference(first, second)
            seen = "yes" if found.mean >= -LOST else "saves, at a loss"
            seen = f"saves; of the loss: {ONE_SEED}" if found.num_seeds == 1 else seen
            seen = "no" if saved <= 0 else seen
            yield Verdict(condition, seen, f"{saved:.0%} of the tokens saved, mIoU {found}")

    return judge


def against(group: Group, name: str, value: float) -> Difference:
    """The group's score less a value that all seeds share."""
    scores = group.read(name) or {}
    return difference(scores, dict.fromkeys(scores, value))


OBJECTIVE_CLAIMS = (
    Claim(
        "OPD takes about 20 % of GRPO's time for as many updates",
        "Fig. 6",
        ("opd", "grpo"),
        takes_a_fifth("opd", "grpo"),
    ),
    *(
        Claim(f"OPD is ahead of GRPO {text}", source, (opd, "grpo"), ahead(opd, "grpo", name, place))
        for opd in ("opd_topk", "opd")
        for text, source, name, place in (
            ("at equal wall seconds (mIoU)", "Fig. 6", "miou", "OPD ends"),
            ("at equal rollouts (mIoU)", "§1", "miou", "OPD's rollouts"),
            ("at equal prompts (R1@0.7)", "Table 1", "r1_07", "end"),
        )
    ),
    Claim(
        "the same, with GRPO's own selection of prompts (R1@0.7)",
        "Table 1",
        ("opd_topk", OWN),
        ahead("opd_topk", OWN, "r1_07", "end"),
    ),
    *(
        Claim(
            f"OPD is ahead of {text} at equal prompts (R1@0.7)",
            "Table 1",
            ("opd_topk", kind),
            ahead("opd_topk", kind, "r1_07", "end"),
        )
        for text, kind in (
            ("off-policy reverse KL", "off_policy_rkd"),
            ("off-policy forward KL", "off_policy_fkd"),
        )
    ),
    *(
        Claim("OPD does not hurt another task", "Fig. 4", (kind,), forgets(kind, False))
        for kind in ("opd_topk", "opd")
    ),
    *(
        Claim("off-policy distillation hurts another task", "Fig. 4", (kind,), forgets(kind, True))
        for kind in ("off_policy_rkd", "off_policy_fkd")
    ),
    Claim("OPD passes its teacher", "Table 6", ("opd_topk",), passes_its_teacher("opd_topk")),
)


def _curriculum(text: str, source: str, a: str, b: str, *places: str) -> Iterator[Claim]:
    for place in places:
        yield Claim(f"{text} (mIoU)", source, (a, b), ahead(a, b, "miou", place))


EQUAL = ("prompts", "tokens")
CURRICULUM_CLAIMS = (
    *_curriculum("TRPV helps", "Table 2", "TRPV", "uniform", *EQUAL),
    *_curriculum("DBTP helps", "Table 2", "DBTP", "uniform", *EQUAL),
    *_curriculum("both together are ahead of none", "Table 2", "TVDF", "uniform", *EQUAL),
    *_curriculum("both are ahead of TRPV alone", "Table 2", "TVDF", "TRPV", *EQUAL),
    *_curriculum("both are ahead of DBTP alone", "Table 2", "TVDF", "DBTP", *EQUAL),
    *(
        claim
        for name in ("dsus", "bbds", "gwds")
        for claim in _curriculum(f"top_k is ahead of {name}", "Table 7", "TVDF", f"TVDF {name}", "prompts")
    ),
    Claim(
        "the gate saves teacher calls at no loss",
        "SCC, Table 6",
        ("gate", "TVDF"),
        saves_tokens("gate", "TVDF", "prompts"),
    ),
    *_curriculum("the gate is ahead at equal teacher tokens", "SCC", "gate", "TVDF", "tokens"),
    *_curriculum(
        "the schedule is ahead of TVDF", "SCC, Table 6", "schedule", "TVDF", "fewest tokens", "fewest prompts"
    ),
    *_curriculum("SCC is ahead of TVDF", "SCC, Table 6", "SCC", "TVDF", "fewest tokens", "fewest prompts"),
    Claim("the student passes its teacher", "Table 6", ("TVDF",), passes_its_teacher("TVDF")),
)
