"""The parts of the check, and what each of them is given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Checks that share a process: methods of the class Checks of a module, called in order.

    The first prepares the others. Each returns what it found, or raises CheckError or NotHere.
    """

    name: str
    module: str
    checks: tuple[str, ...]


def _part(name: str, *checks: str, module: str | None = None) -> Part:
    return Part(name, f"benchmarks.gpu_check.{module or name}", checks)


PARTS = {
    part.name: part
    for part in (
        _part("models", "build"),
        _part(
            "rollout", "start", "sampling", "memory", "log_probs", "reload", "banned_tokens", "given_tokens"
        ),
        _part(
            "teacher",
            *("reference", "tree", "transformers", "transformers_memory"),
            *("vllm", "vllm_alike", "vllm_top_k", "vllm_given", "vllm_memory"),
        ),
        _part("learner", "reference", "tree", "step", "weights", "memory"),
        _part("object_store", "publication", module="transfer"),
        _part("ipc", "publication", module="transfer"),
        _part("collective", "publication", module="transfer"),
    )
}
TRANSFERS = ("object_store", "ipc", "collective")


@dataclass(frozen=True)
class Bench:
    """What a part works with."""

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


def row_name(part: Part, bench: Bench, check: str) -> str:
    return f"{bench.model} {part.name} {check}".replace("_", " ")
