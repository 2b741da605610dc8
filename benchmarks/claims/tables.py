"""Markdown fragments for docs/results.md, and the picture of mIoU against wall seconds."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.claims.reading import END, Comparison, Group, Place, Tuned, difference
from benchmarks.claims.verdicts import Claim
from benchmarks.command import spread

COMMAND = "python -m benchmarks.{} --kinds {}"
IN_FRONT = ("opd_topk", "opd", "grpo")  # left in the picture; the first of them also right
NOT_READ = "-"  # the runs end before, or spend nothing of the kind


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; the keys of the first row are its headings."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def title(group: Group) -> str:
    return group.kind if group.labels == "none" else f"{group.kind}, {group.labels} labels"


def read(group: Group, name: str, place: Place) -> str:
    values = group.read(name, place)
    return NOT_READ if values is None else spread(list(values.values()))


def objective_rows(comparison: Comparison) -> list[dict[str, str]]:
    """A row for each kind and sort of labels."""
    places = [place for place in comparison.places.values() if place.axis]
    return [
        {
            "": f"`{group.kind}`",
            "labels": group.labels,
            "lr": f"{group.lr:g}",
            "mIoU": read(group, "miou", END),
            "R1@0.7": read(group, "r1_07", END),
            "s an update": f"{group.mean('update_s'):.2f}",
            **{f"mIoU {place.heading}": read(group, "miou", place) for place in places},
            "second task": read(group, "second_task", END),
        }
        for group in comparison.groups
    ]


def curriculum_rows(comparison: Comparison) -> list[dict[str, str]]:
    """A row for each kind. Seconds are those of runs beside another: rough."""
    places = [place for place in comparison.places.values() if place.axis]
    return [
        {
            "": group.kind,
            "updates": f"{group.end('step'):.0f}",
            "prompts": f"{group.end('prompts'):,.0f}",
            "teacher tokens": f"{group.end('teacher_tokens'):,.0f}",
            "mIoU": read(group, "miou", END),
            "R1@0.7": read(group, "r1_07", END),
            **{f"mIoU {place.heading}": read(group, "miou", place) for place in places},
            "training, s": f"{group.mean('train_s'):.0f}",
            "of it selecting": f"{group.mean('select_s'):.0f}",
            "second task": read(group, "second_task", END),
        }
        for group in comparison.groups
    ]


def tuning_rows(found: Mapping[tuple[str, str], Tuned]) -> list[dict[str, str]]:
    """mIoU on the validation split of each learning rate; the chosen one is bold."""
    return [
        {"": f"`{kind}`", "labels": labels}
        | {
            f"{lr:g}": f"**{miou:.3f}**" if lr == tuned.lr else f"{miou:.3f}"
            for lr, miou in sorted(tuned.miou.items())
        }
        | {"at an edge": "yes" if tuned.at_edge else "no"}
        for (kind, labels), tuned in found.items()
    ]


def claim_rows(claims: Iterable[Claim], comparison: Comparison, benchmark: str) -> list[dict[str, str]]:
    """A row for each claim and condition, with the command that measures it."""
    kinds, rows = {group.kind for group in comparison.groups}, []
    for claim in claims:
        if not kinds.issuperset(claim.kinds):
            continue
        command = COMMAND.format(benchmark, " ".join(f"'{k}'" if " " in k else k for k in claim.kinds))
        for verdict in claim.judge(comparison):
            row = {"claim of the paper": f"{claim.text} ({claim.source})", "seen here?": verdict.seen}
            row |= {"under which condition": verdict.condition, "measured": verdict.figures}
            rows.append(row | {"command": f"`{command}`"})
    return rows


def sweep_rows(key: str, groups: Mapping[str, Sequence[Group]]) -> list[dict[str, str]]:
    """A row for each value of the key: the end of two or more kinds, and the first less each other one."""
    rows = []
    for value, of_value in groups.items():
        first, *others = of_value
        row = {f"`{key}`": value} | {f"{title(group)}, mIoU": read(group, "miou", END) for group in of_value}
        for other in others:
            found = difference(first.read("miou") or {}, other.read("miou") or {})
            row[f"{title(first)} - {title(other)}"] = str(found)
        rows.append(row)
    return rows


def draw(comparison: Comparison) -> Figure:
    """mIoU, mean over seeds with their range, against wall seconds: OPD and GRPO, and the others."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    kinds = list(dict.fromkeys(group.kind for group in comparison.groups))
    for group in comparison.groups:
        style, color = "--" if group.labels == "wrong" else "-", f"C{kinds.index(group.kind)}"
        miou = np.array([[point["miou"] for point in row["curve"]] for row in group.rows])
        wall_s = np.mean([[point["wall_s"] for point in row["curve"]] for row in group.rows], axis=0)
        panels = [left] * (group.kind in IN_FRONT) + [right] * (group.kind not in IN_FRONT[1:])
        for axes in panels:
            axes.plot(wall_s, miou.mean(0), style, color=color, label=title(group), marker=".")
            axes.fill_between(wall_s, miou.min(0), miou.max(0), color=color, alpha=0.15)
    left.set(title="OPD and GRPO", ylabel="held-out mIoU, mean and range of seeds")
    right.set(title=f"the others, and {IN_FRONT[0]}")
    for axes in (left, right):
        axes.set(xlabel="wall seconds of training")
        if axes.lines:
            axes.legend(fontsize="small", loc="lower right")
    return figure


def paste(document: Path, out: Path) -> list[str]:
    """Puts OUT/NAME.md between the lines `<!-- NAME -->` and `<!-- end -->` of a document; returns the names.

    Parts without a file stay as they are. Copies OUT's pictures beside the document. Raises ValueError, and
    writes nothing, if the last part has no end.
    """
    kept, pasted, inside = list[str](), list[str](), False
    for line in document.read_text().splitlines():
        name = line.removeprefix("<!-- ").removesuffix(" -->") if line.startswith("<!-- ") else ""
        inside = inside and name != "end"
        if not inside:
            kept.append(line)
        if name and name != "end" and (out / f"{name}.md").is_file():
            kept.append((out / f"{name}.md").read_text().rstrip("\n"))
            pasted.append(name)
            inside = True
    if inside:
        raise ValueError(f"{document} has no line <!-- end --> after <!-- {pasted[-1]} -->: add it")
    for picture in out.glob("*.png"):
        shutil.copy(picture, document.parent)
    document.write_text("\n".join(kept) + "\n")
    return pasted
