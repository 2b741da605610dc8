"""The exception tree. Errors that a user can cause derive from InputError and end the program with code 2."""

from enum import StrEnum


class VideoOPDError(Exception):
    """Root of every error this project raises on purpose."""


class InputError(VideoOPDError, ValueError):
    """Bad input from the user: one line that says what, where, and what to do."""


class ConfigError(InputError):
    """A configuration with a missing or unknown key, or a value of the wrong type or range."""


class ClusterError(InputError):
    """A Ray cluster that does not answer, refuses this process, or lacks what the run needs."""


class DataError(InputError):
    """An annotation file that cannot be read, or annotations that contradict themselves."""


class FailureKind(StrEnum):
    """Why a clip could not be read: the label under which its prompt is counted."""

    MISSING = "missing"
    UNREACHABLE = "unreachable"  # its storage refuses it now
    REPLACED = "replaced"
    TOO_SLOW = "too_slow"
    WORKER_KILLED = "worker_killed"
    DECODER_CRASHED = "decoder_crashed"
    BROKEN = "broken"
    OTHER = "other"


class ClipError(InputError):
    """A clip is missing or cannot be decoded. It stops a launch; during a run its prompt is retired."""

    def __init__(self, message: str, kind: FailureKind = FailureKind.OTHER):
        super().__init__(message)
        self.kind = kind


class BrokenVideo(ClipError):
    """A file that cannot be decoded now or later, until it is replaced."""

    def __init__(self, path: str, reason: str, kind: FailureKind = FailureKind.BROKEN):
        mend = "replace the file, as by `ffmpeg -i FILE -c:v libx264 NEW.mp4`"
        advice = f"{mend}, or remove its lines from the annotations"
        super().__init__(f"video {path} {reason}: {advice}", kind)
        self.path, self.reason = path, reason

    def __reduce__(self):  # Ray and Serve pickle errors
        return BrokenVideo, (self.path, self.reason, self.kind)


def storage_error(path: str, error: OSError) -> ClipError:
    """What the storage says of a video: it is missing, or cannot be read now. A later time may differ."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        advice = "put it there, or remove its lines from the annotations"
        return ClipError(f"video {path} is missing: {advice}", FailureKind.MISSING)
    advice = "check its permissions and its storage"
    return ClipError(f"video {path} cannot be read now ({error.strerror}): {advice}", FailureKind.UNREACHABLE)


class ModelError(InputError):
    """A model folder is missing or damaged, or two models differ in tokenizer or architecture."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, or made by another model, config or version."""


class PartialCheckpointError(CheckpointError):
    """Incomplete: a part was never written or is gone. The previous checkpoint is usable."""


class ParityError(VideoOPDError):
    """Two processes see different inputs or numbers for one trajectory; the run must stop."""


class RunError(VideoOPDError, RuntimeError):
    """The run cannot continue, and its input is not the cause."""


class WeightsLostError(RunError):
    """A version of the weights arrived incomplete or is gone: send it again, or a later one."""


class DeadlineError(RunError):
    """A wait for another process reached its deadline."""


class LearnerLostError(RunError):
    """A learner rank died or hangs: all ranks must restart from a checkpoint."""


class SaveError(RunError):
    """A checkpoint or an export was not written; the run itself can go on."""


class PartLostError(RunError):
    """A process was lost more often than it may be restarted."""


class StoppedError(VideoOPDError):
    """A signal asked the run to end."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return self.args[0]


def first_error(error: BaseException) -> BaseException:
    """The first of the errors inside an exception group, or the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
