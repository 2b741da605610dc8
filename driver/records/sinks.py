"""metrics.jsonl and TensorBoard."""

import json
import math
from pathlib import Path

from video_opd.files.run_folder import write_atomically
from video_opd.types import StepReport


class MetricSinks:
    """Writes metrics.jsonl, one line per step, and TensorBoard, finite values only. A resumed run appends."""

    def __init__(self, run_dir: Path, start_step: int):
        from tensorboard.summary import Writer

        path = run_dir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start_step]
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, report: StepReport, wall_s: float) -> None:
        """`wall_s`: seconds since the epoch."""
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
    """The lines of metrics.jsonl, without a last line cut off by a crash."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
