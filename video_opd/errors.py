"""The exception tree. Every error a user can cause derives from InputError and ends the program with code 2."""


class VideoOPDError(Exception):
    """Root of every error this project raises on purpose."""


class InputError(VideoOPDError, ValueError):
    """Bad input from the user: one line that says what, where, and what to do."""


class ConfigError(InputError):
    """A configuration that is missing a key, has an unknown one, or a value of the wrong type or range."""


class ClusterError(InputError):
    """A Ray cluster that does not answer, does not let this process in, or has not what the run asks for."""


class DataError(InputError):
    """An annotation file that cannot be read, or annotations that contradict themselves."""


class ClipError(InputError):
    """A clip that is missing or cannot be decoded. Before the run it ends it; while running it retires its prompt."""


_FAILURES = {  # what a ClipError says: what it is counted as
    "is missing": "missing",
    "it was replaced": "replaced",
    "was not decoded within": "too_slow",
    "its worker was killed": "worker_killed",
    "crash (exit code": "decoder_crashed",
    "cannot be decoded": "broken",
    "frames at": "broken",
}
FAILURE_KINDS = (*dict.fromkeys(_FAILURES.values()), "other")


def failure_kind(reason: str) -> str:
    """One of FAILURE_KINDS: of what a ClipError says, which names the file too."""
    return next((kind for said, kind in _FAILURES.items() if said in reason), "other")


class ModelError(InputError):
    """A model folder that is missing, or models that cannot work together (another tokenizer, another architecture)."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, or of another model, config or version."""


class PartialCheckpointError(CheckpointError):
    """A checkpoint of which a part was provably never written, or is gone: the one before it can be used."""


class ParityError(VideoOPDError):
    """Two parties see different inputs or different numbers for one trajectory; the run must stop."""


class RunError(VideoOPDError, RuntimeError):
    """The run cannot go on, by no fault of its input."""


class WeightsLostError(RunError):
    """A version of the weights that did not arrive whole, or is no longer to be had: it must be sent anew, or a later one."""


class DeadlineError(RunError):
    """A wait for another process reached its deadline."""


class LearnerLostError(RunError):
    """A rank of the learner died or hangs, or took the weights with it: the group must start again from a checkpoint."""


class PartLostError(RunError):
    """A process of the run was lost more often than it may be started again."""


class StoppedError(VideoOPDError):
    """The run ended because it was asked to by a signal."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)
        self.message, self.signal_number = message, signal_number

    def __str__(self) -> str:
        return self.message

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number
