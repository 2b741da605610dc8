"""Trackers get every line of metrics.jsonl once, keep to themselves what is secret, and stop no run.

The real ones are fed in a process of their own, without a network and a key; what they wrote is read back.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imsave

from driver.records import trackers as feeds
from driver.records.masking import masked, masked_config
from driver.records.sinks import MetricSinks
from driver.records.tracker_kinds import KINDS
from driver.records.trackers import STATE, Trackers
from preflight.options import TRACKERS, check_trackers
from tests.video_opd.test_config import MINIMAL
from video_opd import ROOT
from video_opd.config_file import describe_keys, parse_config
from video_opd.errors import ConfigError
from video_opd.types import StepReport

SECRET = "sesame-1f3d5b79"
ENVIRONMENT = {"UNRELATED": SECRET, "HF_TOKEN": SECRET, "no_proxy": "*"}
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID")


def config_of(*names: str, **more: Any):
    return parse_config(MINIMAL | {"trackers": [*names], **more}, "test")


def write(run: Path, trackers: Trackers, start: int, end: int, value: float = 0.0) -> None:
    sinks = MetricSinks(run, start, trackers)
    for step in range(start, end):
        metrics = {"learner/loss": value + step, "eval/r1@0.5": step / 8, "nothing": float("nan")}
        sinks.write(StepReport(step=step, policy_version=step + 1, metrics=metrics), wall_s=1000.0 + step)
    sinks.close()


def feed(run: Path) -> None:
    """Steps 0 to 3, then a resume from step 2, whose values are others, to step 5; the report."""
    run.mkdir()
    feeds.SEND_S = 300.0  # on a busy machine MLflow takes longer than a minute to be imported
    secrets: Any = {
        "worker_env": {"WANDB_API_KEY": SECRET},
        "checkpoint_url": f"s3://me:{SECRET}@bucket/runs",
    }
    files = [run / "report.html", run / "timeline-1.png"]
    files[0].write_text("<h1>report</h1>")
    imsave(files[1], [[0.0, 1.0], [1.0, 0.0]])
    states = []
    for start, end, value in ((0, 4, 0.0), (2, 6, 100.0)):
        with Trackers(run, config_of(*KINDS, **secrets)) as trackers:
            write(run, trackers, start, end, value)
            trackers.attach(files)
            states.append([trackers.states(), json.loads((run / STATE).read_text())])
    (run / "states.json").write_text(json.dumps(states))


Rows = dict[int, list[tuple[float, float]]]  # by step: loss and recall


def read_tensorboard(run: Path) -> tuple[Rows, dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    rows: Rows = {}
    for file in sorted((run / "tensorboard").iterdir()):
        num_steps = len(
            {event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")}
        )
        num_events = sum(1 for _ in EventFileLoader(str(file)).Load())
        assert num_events == num_steps + 1, "one a step after the file's head"
        board = EventAccumulator(str(file)).Reload()
        for loss, recall in zip(board.Scalars("learner/loss"), board.Scalars("eval/r1@0.5"), strict=True):
            assert loss.wall_time == 1000.0 + loss.step
            rows.setdefault(loss.step, []).append((loss.value, recall.value))
    return rows, {}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if (rest := 32768 - at % 32768) < 7:  # too few for a header: the block is padded
            at += rest
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(record)
            record = b""


def read_wandb(run: Path) -> tuple[Rows, dict[str, Any]]:
    rows, config, ids, media = Rows(), {}, set(), set()
    for file in sorted((run / "trackers" / "wandb").glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                media |= {name.partition("/")[0] for name in items} & {"report", "timeline-1"}
                if "learner/loss" in items:
                    values = float(items["learner/loss"]), float(items["eval/r1@0.5"])
                    rows.setdefault(int(items["_step"]), []).append(values)
    assert len(ids) == 1, "a resume is the same run"
    assert media == {"report", "timeline-1"}
    return rows, config


def read_mlflow(run: Path) -> tuple[Rows, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'trackers' / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "video-opd"]
    (found,) = client.search_runs([experiment.experiment_id])
    rows: Rows = {}
    histories = [client.get_metric_history(found.info.run_id, k) for k in ("learner/loss", "eval/r1_0.5")]
    for loss, recall in zip(*histories, strict=True):
        assert loss.timestamp == 1000 * (1000 + loss.step)
        rows.setdefault(loss.step, []).append((loss.value, recall.value))
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"report.html", "timeline-1.png", "config.yaml"}
    assert found.info.status == "FINISHED" and found.info.run_name == run.name
    assert len(found.data.tags["mlflow.source.git.commit"]) >= 7
    assert found.data.params["learner.world_size"] == "1"
    return rows, {k: found.data.params[k] for k in ("checkpoint_url", "worker_env.WANDB_API_KEY")}


def read_trackio(run: Path) -> tuple[Rows, dict[str, Any]]:
    rows, media = Rows(), set()
    with sqlite3.connect(run / "trackers" / "trackio" / "video-opd.db") as base:
        lines = base.execute("select step, metrics, run_id from metrics order by id").fetchall()
        ((config,),) = base.execute("select config from configs").fetchall()
    for step, text, _ in lines:
        metrics = json.loads(text)
        media |= metrics.keys() & {"report", "timeline-1"}
        if "learner/loss" in metrics:
            rows.setdefault(step, []).append((metrics["learner/loss"], metrics["eval/r1@0.5"]))
    assert len({of for *_, of in lines}) == 1, "a resume is the same run"
    assert media == {"report", "timeline-1"}
    return rows, json.loads(config)


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def test_what_trackers_wrote_without_a_key_is_read_back_and_holds_each_step_once_and_no_secret(tmp_path):
    run = tmp_path / "run-1"
    code = f"from tests.driver.test_trackers import *; feed(Path({str(run)!r}))"
    clean = {k: v for k, v in os.environ.items() if k not in KEYS} | ENVIRONMENT | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, f"worker_env.KEY={SECRET}"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (states, first), (_, second) = json.loads((run / "states.json").read_text())
    assert states == dict.fromkeys(KINDS, "on"), done.stdout + done.stderr
    expected = [*range(4), 104.0, 105.0]
    for name, read in READ.items():
        rows, config = read(run)
        assert rows == {step: [(float(loss), step / 8)] for step, loss in enumerate(expected)}, name
        assert second[name] == first[name] | {"next_step": 6}
        assert name == "tensorboard" or ("***" in str(config) and SECRET not in str(config))
    holding = [f for f in tmp_path.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]
    assert not holding


class Fake:
    """Keeps what it is given in `self.got`; `fails` says at which step it raises, or hangs."""

    got: list[Any]
    fails: Any = None

    def begin(self, about, known):
        self.got.append(("begin", known))
        return known or "id-1"

    def log(self, metrics, step, wall_s):
        if step == self.fails:
            raise ConnectionError(f"https://me:{SECRET}@host is gone\nand more")
        if isinstance(self.fails, threading.Event):
            self.fails.wait(20)
        self.got.append(step)

    def attach(self, files, step):
        self.got.append(("attach", files, step))

    def end(self, failed):
        self.got.append(("end", failed))


def fake(fails: Any = None) -> type[Fake]:
    return type("Fake", (Fake,), {"got": [], "fails": fails})


def test_a_tracker_that_fails_is_told_of_once_and_off_the_others_go_on_and_a_resume_sends_the_rest(
    tmp_path, caplog
):
    bad, good = fake(fails=2), fake()
    config = config_of("wandb", "mlflow")
    with Trackers(tmp_path, config, {"wandb": bad, "mlflow": good}) as trackers:
        write(tmp_path, trackers, 0, 5)
        states = trackers.states()
        trackers.attach([tmp_path / "report.html"])
    why = "off from step 2 on: ConnectionError: https://***@host is gone"
    assert states == {"wandb": why, "mlflow": "on"}
    assert [r.message for r in caplog.records] == [
        f"warning: the tracker wandb is {why}; the run goes on without it"
    ]
    assert bad.got == [("begin", None), 0, 1]
    assert good.got[1:] == [*range(5), ("attach", [tmp_path / "report.html"], 4), ("end", False)]
    again = fake()
    with Trackers(tmp_path, config, {"wandb": again, "mlflow": fake()}) as trackers:
        write(tmp_path, trackers, 5, 7)
    assert again.got == [("begin", "id-1"), *range(2, 7), ("end", False)]


def test_a_tracker_that_hangs_delays_no_step_and_the_end_by_a_bound(tmp_path, monkeypatch):
    hangs, good = fake(fails=threading.Event()), fake()
    monkeypatch.setattr(feeds, "SEND_S", 0.2)
    with Trackers(tmp_path, config_of("wandb", "mlflow"), {"wandb": hangs, "mlflow": good}) as trackers:
        write(tmp_path, trackers, 0, 3)
        states = trackers.states()
    hangs.fails.set()
    assert states["wandb"].startswith("off from step 0 on: it has not taken in time")
    assert good.got[-1] == ("end", False) and states["mlflow"] == "on"


def test_a_run_that_fails_is_marked_so(tmp_path):
    kind = fake()

    def run() -> None:
        with Trackers(tmp_path, config_of("wandb"), {"wandb": kind}) as trackers:
            trackers.begin([])
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run()
    assert kind.got == [("begin", None), ("end", True)]


def test_steps_that_a_restarted_learner_repeats_are_not_sent_again(tmp_path):
    kind = fake()
    with Trackers(tmp_path, config_of("wandb"), {"wandb": kind}) as trackers:
        write(tmp_path, trackers, 0, 4)
        write(tmp_path, trackers, 2, 6)
    assert kind.got == [("begin", None), *range(6), ("end", False)]


def test_what_looks_like_a_secret_is_masked_and_no_key_of_the_configuration_is_taken_for_one():
    names = {line.split("=")[0].strip().rpartition(".")[2] for line in describe_keys()}
    assert masked(dict.fromkeys(names, "value")) == dict.fromkeys(names, "value")
    tree = {
        "wandb": {"api_key": "0123", "accessToken": ["a"], "max_tokens": 5},
        "url": f"https://host/x?X-Amz-Signature={SECRET}&part=2",
        "note": f"hf_{'a' * 30} and sk-{'b' * 30}",
    }
    assert masked(tree) == {
        "wandb": {"api_key": "***", "accessToken": ["***"], "max_tokens": 5},
        "url": "https://host/x?***&part=2",
        "note": "*** and ***",
    }
    assert masked_config(config_of(worker_env={"A": "b"}))["worker_env"] == {"A": "***"}


def test_a_tracker_without_its_package_or_named_twice_is_refused_before_anything_starts(monkeypatch):
    check_trackers(config_of(*KINDS))
    monkeypatch.setitem(TRACKERS, "wandb", ("wandb_of_tomorrow",))
    with pytest.raises(ConfigError, match=r"trackers names wandb, .*wandb_of_tomorrow is not installed: pip"):
        check_trackers(config_of("wandb"))
    with pytest.raises(ConfigError, match="name each once"):
        config_of("wandb", "wandb")
