"""Where numbers go: phase clocks, metrics.jsonl, TensorBoard."""

import json
import math
from pathlib import Path

from video_opd.types import StepReport


class MetricSinks:
    """metrics.jsonl, one line a step, and TensorBoard. A resumed run goes on in the same files, each step once.

    What a step has no value for (the mIoU of unlabelled prompts, say) is left out of its line.
    """

    def __init__(self, run_dir: Path, start_step: int):
        from tensorboard.summary import Writer

        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] < start_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.rename(self._path)
        self._file = self._path.open("a")
        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, report: StepReport, wall_s: float) -> None:
        known = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
        line = {"step": report.step, "policy_version": report.policy_version, "wall_s": wall_s, **known}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in known.items():
            self._board.add_scalar(name, value, report.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line torn by a crash is left out."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
