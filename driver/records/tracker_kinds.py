"""The trackers that a run can feed: TensorBoard, Weights & Biases, MLflow, Trackio.

Each sends what it is given and nothing else: no environment, no command line, no code, no terminal output.
Without a key or a server each writes below RUN/trackers. Their packages are imported when a run begins.
"""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT, TENSORBOARD = "video-opd", "tensorboard"
SEND_S = 60.0  # what a tracker gets to send the rest
_NOT_MLFLOW = re.compile(r"[^\w./: -]")  # characters that MLflow takes in no name of a metric


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run at its beginning."""

    folder: Path  # of the run, whose name is the run's there
    config: Mapping[str, Any]  # without secrets

    def store(self, name: str) -> Path:
        """A folder for what a tracker keeps here."""
        folder = self.folder / "trackers" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Tracker(Protocol):
    """One tracker of one run. Called from one thread; whatever it raises turns it off."""

    def begin(self, about: About, known: str | None) -> str:
        """Goes on with the run of the id `known` if it is still there; returns the id."""
        ...

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float) -> None: ...

    def attach(self, files: Sequence[Path], step: int) -> None:
        """HTML and PNG files, beside the metrics of `step`."""
        ...

    def end(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, scalars alone: the pictures are in the run folder beside them."""

    def begin(self, about: About, known: str | None) -> str:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = about.folder / TENSORBOARD
        run = known if known and folder.is_dir() else uuid.uuid4().hex
        self._board = EventFileWriter(str(folder))
        self._event: Any = vars(event_pb2)["Event"]  # one a step: tensorboard's Writer takes 20 times as long
        return run

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float) -> None:
        scalars = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._board.add_event(self._event(step=step, wall_time=wall_s, summary={"value": scalars}))

    def attach(self, files: Sequence[Path], step: int) -> None:
        pass

    def end(self, failed: bool) -> None:
        self._board.close()


class WeightsAndBiases:
    """Online with a key (WANDB_API_KEY, `wandb login`) unless WANDB_MODE says otherwise, else offline."""

    def begin(self, about: About, known: str | None) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet: dict[str, Any] = dict.fromkeys(("disable_git", "disable_code", "silent"), True)
        quiet |= dict.fromkeys(("x_disable_meta", "x_disable_stats", "x_disable_machine_info"), True)
        quiet |= {"save_code": False, "x_save_requirements": False, "console": "off"}
        # Without them the process waits at its exit for as long as the server does not answer.
        quiet |= {"finish_timeout": 0.8 * SEND_S, "finish_timeout_raises": True}
        self._wandb: Any = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.folder.name,
            id=known or uuid.uuid4().hex,
            resume="allow",
            dir=str(about.store("wandb")),
            config=dict(about.config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(**quiet),
        )
        return self._run.id

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, files: Sequence[Path], step: int) -> None:
        html, image = (lambda path: self._wandb.Html(path, inject=False)), self._wandb.Image
        self._run.log({f.stem: (html if f.suffix == ".html" else image)(str(f)) for f in files}, step=step)

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """The server of MLFLOW_TRACKING_URI, else SQLite. The '@' of r1@0.5 is '_' there: MLflow refuses it."""

    def begin(self, about: About, known: str | None) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        store, uri = about.store("mlflow"), os.environ.get("MLFLOW_TRACKING_URI")
        self._metric, self._client = Metric, MlflowClient(uri or f"sqlite:///{store}/mlflow.db")
        self._run = ""
        if known:
            try:
                self._run = self._client.get_run(known).info.run_id
                self._client.update_run(self._run, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if not self._run:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(project)
            place = None if uri else f"file://{store}/files"
            experiment = found.experiment_id if found else self._client.create_experiment(project, place)
            commit = about.config.get("environment", {}).get("git_commit", "unknown")
            tags = {"mlflow.source.git.commit": commit, "mlflow.source.name": PROJECT}
            self._run = self._client.create_run(experiment, run_name=about.folder.name, tags=tags).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flat(about.config)]
            for first in range(0, len(params), 100):  # MLflow takes so many at once
                self._client.log_batch(self._run, params=params[first : first + 100])
        self._client.log_dict(self._run, dict(about.config), "config.yaml")
        return self._run

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float) -> None:
        at = int(wall_s * 1000), step
        named = [self._metric(_NOT_MLFLOW.sub("_", name), value, *at) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=named)

    def attach(self, files: Sequence[Path], step: int) -> None:
        for file in files:
            self._client.log_artifact(self._run, str(file))

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Trackio:
    """The space or server of TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, else SQLite, in TRACKIO_DIR if set."""

    def begin(self, about: About, known: str | None) -> str:
        os.environ.setdefault("TRACKIO_DIR", str(about.store("trackio")))
        import trackio

        self._trackio: Any = trackio
        self._run = trackio.init(
            project=PROJECT,
            name=about.folder.name,
            resume="allow" if known else "never",
            config=dict(about.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return self._run.id

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, files: Sequence[Path], step: int) -> None:
        html, image = self._trackio.Html, self._trackio.Image
        for f in files:
            self._run.log({f.stem: (html if f.suffix == ".html" else image)(str(f))}, step=step)

    def end(self, failed: bool) -> None:
        self._run.finish()


KINDS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{key}.") if inner else [(prefix + key, value)]
    return found
