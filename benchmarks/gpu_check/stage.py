"""The parts of the check, and what each of them is given."""

from dataclasses import dataclass

STAGES = {  # of each, the methods of its module's class Stage, in order; the first prepares the others
    "models": ("build",),
    "rollout": ("start", "seeds", "memory", "log_probs", "reload", "banned_tokens", "scores_of_given_tokens"),
    "teacher": ("reference", "transformers", "transformers_memory", "vllm", "vllm_memory"),
    "learner": ("reference", "step", "weights", "memory"),
    "object_store": ("publication",),
    "ipc": ("publication",),
    "collective": ("publication",),
}
TRANSFERS = ("object_store", "ipc", "collective")


def module_of(stage: str) -> str:
    return f"benchmarks.gpu_check.{'transfer' if stage in TRANSFERS else stage}"


@dataclass(frozen=True)
class Bench:
    """What a stage works with."""

    model: str  # of configs/shapes
    folder: str  # of models, clips and all that is written
    device: str  # cuda or cpu
    tiny: bool

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


class CheckError(Exception):
    """A check found what must not be."""


class NotHere(Exception):
    """A check does not apply on this machine."""


def row_name(stage: str, bench: Bench, check: str) -> str:
    return f"{bench.model} {stage} {check}".replace("_", " ")
