"""All that decides a run of the comparison, but the code, the data and the start."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Labels = Literal["clean", "wrong"]
Part = Literal["start", "time", "tune", "learn", "move"]
GROUPS = 32  # prompts of an update
# Phases do not overlap, so that two runs fill two cores. A constant learning rate: curves are read within.
SHARED = ("max_policy_lag=0", f"groups_per_step={GROUPS}", "learner.warmup_frac=0", "learner.final_lr_frac=1")
EVAL_EVERY = 4  # updates; equal costs can be early in a curve, and lines between far points run below it


@dataclass(frozen=True)
class Case:
    """One run, by all that decides it but the code, the data and the start.

    part: `start` measures the start alone, `time` an update alone on the machine; `tune` and `move` are
    evaluated on the validation split, `learn` on the evaluation split.
    """

    part: Part
    kind: str
    labels: Labels
    seed: int = 0
    lr: float = 0.0
    steps: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """Of the run folder."""
        words = re.sub(r"\W+", "-", f"{self.part} {self.kind} {self.labels} {self.lr:g} {self.seed}")
        return f"{words}-{hashlib.blake2b(self.key.encode(), digest_size=3).hexdigest()}"


def data_folder(out: Path) -> Path:
    """Of the splits, in the folder of a comparison."""
    return out / "data"
