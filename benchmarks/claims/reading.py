"""Reads curves at equal costs, compares kinds seed by seed, and picks learning rates by validation alone."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.command import Row

Scores = Mapping[int, float]  # by seed
BEYOND = 0.01  # share by which a curve may end before the place where it is read


@dataclass(frozen=True)
class Place:
    """Where curves are read: at equal costs."""

    heading: str
    axis: str | None = None  # a key of the curve's points; None: at the end of each run
    where: float = 0.0


END = Place("at the end")


@dataclass(frozen=True)
class Group:
    """The learning runs of one kind on labels of one sort, one for each seed."""

    kind: str
    labels: str  # none: the kind sees no label
    lr: float
    rows: Sequence[Row]

    def mean(self, name: str) -> float:
        return float(np.mean([row[name] for row in self.rows]))

    def end(self, axis: str) -> float:
        """What the runs have spent at their end, on average."""
        return float(np.mean([row["curve"][-1][axis] for row in self.rows]))

    def read(self, name: str, place: Place = END) -> Scores | None:
        """A score of each seed: the row's, or its curve's at a place; None: a curve ends before."""
        if place.axis is None:
            return {row["seed"]: row[name] for row in self.rows}
        found = {row["seed"]: read_at(row["curve"], name, place.axis, place.where) for row in self.rows}
        known = {seed: value for seed, value in found.items() if value is not None}
        return known if len(known) == len(found) else None


@dataclass(frozen=True)
class Comparison:
    """All that tables and verdicts are made of. second_task: the start's accuracy on it."""

    groups: Sequence[Group]
    places: Mapping[str, Place]
    second_task: float

    def pairs(self, a: str, b: str) -> Iterator[tuple[str, Group, Group]]:
        """(labels, group of a, group of b), for each sort of labels; a kind that sees none goes with all."""
        of = [[group for group in self.groups if group.kind == kind] for kind in (a, b)]
        for one, other in itertools.product(*of):
            if one.labels == other.labels or "none" in (one.labels, other.labels):
                yield other.labels if one.labels == "none" else one.labels, one, other


def read_at(curve: Sequence[Mapping[str, float]], name: str, axis: str, where: float) -> float | None:
    """The score where `axis` is `where`, on straight lines between evaluations; None: the curve ends before.

    Before the first point it is the first point's: nothing was learned yet.
    """
    spent = [point[axis] for point in curve]
    if spent[-1] < where * (1 - BEYOND):
        return None
    return float(np.interp(where, spent, [point[name] for point in curve]))


def with_seconds(row: Row, update_s: float, select_s: float) -> Row:
    """A row whose curve has wall_s: quiet seconds of selection and updates, without evaluations."""
    curve = [point | {"wall_s": select_s + update_s * point["step"]} for point in row["curve"]]
    return row | {"update_s": update_s, "select_s": select_s, "curve": curve}


@dataclass(frozen=True)
class Difference:
    """a - b of the same seeds."""

    mean: float
    low: float
    high: float
    num_positive: int
    num_seeds: int
    apart: bool  # the lowest of one is above the highest of the other

    def __str__(self) -> str:
        seeds = f"{self.num_positive} of {self.num_seeds} seeds"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f}; above in {seeds})"


def difference(a: Scores, b: Scores) -> Difference:
    """Raises ValueError if the seeds differ."""
    if a.keys() != b.keys():
        raise ValueError(
            f"seeds {sorted(a)} and {sorted(b)} cannot be paired: run both with the same --seeds"
        )
    gaps = [a[seed] - b[seed] for seed in a]
    above, below = list(a.values()), list(b.values())
    apart = min(above) > max(below) or min(below) > max(above)
    return Difference(float(np.mean(gaps)), min(gaps), max(gaps), sum(g > 0 for g in gaps), len(gaps), apart)


@dataclass(frozen=True)
class Tuned:
    """The learning rate of highest mIoU on the validation split; of equal ones the lowest."""

    lr: float
    miou: Mapping[float, float]  # of each learning rate tried

    @property
    def at_edge(self) -> bool:
        return self.lr in (min(self.miou), max(self.miou)) and len(self.miou) > 1


def tuned(trials: Iterable[Mapping[str, Any]]) -> Tuned:
    """Of rows with lr and miou. Raises ValueError if one was not evaluated on the validation split."""
    miou: dict[float, float] = {}
    for row in trials:
        if row["part"] != "tune":
            raise ValueError(f"a row of part {row['part']} cannot tune: only validation may")
        miou[row["lr"]] = row["miou"]
    return Tuned(min(miou, key=lambda lr: (-miou[lr], lr)), miou)
