"""A real Prometheus beside a running launch.py: every expression of the board and of the alerts has data, and it is the run's."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from demo.clips import write_split
from tests.conftest import require_prometheus
from tests.real.test_chaos import ROOT, end, kill_all, last_step, processes, start, wait_for
from tests.real.test_launch import metrics_of

PATIENCE_S = 120.0
REPORT_S, SCRAPE_S, RATE = 5, 2, "1m"
READERS = ("actor", "teacher", "learner")  # of clips
ROUND_TRIP_S = 8  # beyond it a gauge that stands still must have grown


class Watched(NamedTuple):
    """What was seen of a run that was watched."""

    folder: Path
    ray_dir: Path
    panels: dict[str, list[float]]  # expression: its values
    alerts: dict[str, list[float]]
    history: dict[str, list[float]]  # metric: what Prometheus scraped of it
    still_s: float  # seconds since the last step, while no step could end
    output: str


class Prometheus:
    """Debian's, with deploy/prometheus.yml but for where Ray writes, how often it scrapes, and its port."""

    def __init__(self, folder: Path, ray_dir: Path):
        config = (ROOT / "deploy/prometheus.yml").read_text()
        for ours, theirs in (("/tmp/ray", str(ray_dir)), ("interval: 10s", f"interval: {SCRAPE_S}s")):
            assert ours in config
            config = config.replace(ours, theirs)
        (folder / "prometheus.yml").write_text(config)
        shutil.copy(ROOT / "deploy/alerts.yml", folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "output.txt").open("w") as output:
            command = ["prometheus", *options, f"--web.listen-address={self.address}"]
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def query(self, expression: str) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """Those that are numbers."""
        return [v for r in self.query(expression) if math.isfinite(v := float(r["value"][1]))]

    def is_up(self) -> bool:
        try:
            return not self.query("absent(up)")
        except OSError:
            return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def board_expressions(run: str) -> list[str]:
    board = json.loads((ROOT / "deploy/grafana/video_opd.json").read_text())
    expressions = [t["expr"] for p in board["panels"] for t in p.get("targets", [])]
    return [e.replace("$__rate_interval", RATE).replace("$run", run) for e in expressions]


def alert_expressions() -> list[str]:
    """Without the comparison: nothing is wrong with the run, and what is compared must be there all the same."""
    rules = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0]["rules"]
    return [re.split(r" [<>]=? ", rule["expr"])[0] for rule in rules]


def wait_until(condition, run: subprocess.Popen, what: str) -> None:
    """As wait_for, but without it the tests go on and say what is missing."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, f"the run ended before {what}"
        if time.monotonic() > deadline:
            return
        time.sleep(1.0)


@pytest.fixture(scope="module")
def ray_tmp() -> Iterator[Path]:
    """A temporary folder of its own for Ray, with a short name for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def watched(overrides, ray_tmp, tmp_path_factory) -> Watched:
    require_prometheus()
    folder = tmp_path_factory.mktemp("watch")
    write_split(folder / "train", "train", 16, ("colour", "shape"))
    names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    data = [f"data.train.{key}={folder / 'train' / name}" for key, name in names.items()]
    options = [
        *(
            "num_steps=1000000",
            "groups_per_step=6",
            "max_policy_lag=1",
            "learner.micro_batch=3",
            "eval_every=3",
        ),
        *("rollout.prompts_per_call=3", "rollout.prompts_per_result=1", "rollout.max_response_tokens=6"),
        *(
            "data.eval.max_prompts=4",
            "request_timeout_s=120",
            "start_timeout_s=180",
            f"runs_dir={folder}",
            "run_name=watched",
        ),
        *(
            f"video.cache_dir={folder / 'frames'}",
            "video.cache_bytes=500000",
        ),  # too little for all: clips are decoded again
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", str(ray_tmp))
        environment.setenv("RAY_metrics_report_interval_ms", str(REPORT_S * 1000))
        run = start(folder, *overrides, *data, *options)
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), ray_tmp / "ray")
    try:
        wait_for(
            lambda: "Ray dashboard" in (folder / "output.txt").read_text(),
            run,
            "Ray, after the start-up checks",
        )
        broken = folder / "train" / "videos" / "train00003.mp4"
        broken.write_bytes(broken.read_bytes()[:1000])
        wait_for(lambda: last_step(folder / "watched") >= 6, run, "step 6")
        wait_for(prometheus.is_up, run, "answer of Prometheus")
        panels, alerts = board_expressions("watched"), alert_expressions()
        dropped = 'ray_video_opd_dropped_prompts{reason="broken"} > 0'
        reads = next(e for e in panels if "frame_cache_reads" in e)
        awaited = [
            f"count({reads}) >= {len(READERS)}",
            *panels,
            *alerts,
            dropped,
            'changes(ray_video_opd_learner_reverse_kl{run="watched"}[10m]) > 0',
        ]
        wait_until(lambda: all(prometheus.values(e) for e in awaited), run, "data for every expression")
        found = {e: prometheus.values(e) for e in [*panels, dropped]}
        of_alerts = {e: prometheus.values(e) for e in alerts}
        names = ("learner_reverse_kl", "step", "actors_miou", "eval_miou")
        history = {name: _history(prometheus, name) for name in names}
        still_s = _seconds_without_a_step(prometheus, run)
        run.send_signal(signal.SIGTERM)
        output = end(run, folder, 128 + signal.SIGTERM)
    except BaseException:
        print((folder / "output.txt").read_text()[-3000:])
        raise
    finally:
        kill_all(run)
        prometheus.stop()
    return Watched(folder / "watched", ray_tmp / "ray", found, of_alerts, history, still_s, output)


def _history(prometheus: Prometheus, name: str) -> list[float]:
    return [
        float(v)
        for r in prometheus.query(f'ray_video_opd_{name}{{run="watched"}}[10m]')
        for _, v in r["values"]
    ]


def _seconds_without_a_step(prometheus: Prometheus, run: subprocess.Popen) -> float:
    """As Prometheus sees it while the learner is stopped."""
    (learner,) = processes(run, "rank")
    seconds = 'max(ray_video_opd_seconds_since_step{run="watched"})'
    learner.suspend()
    try:
        wait_until(
            lambda: max(prometheus.values(seconds), default=0.0) > ROUND_TRIP_S, run, "seconds without a step"
        )
        return max(prometheus.values(seconds), default=0.0)
    finally:
        learner.resume()


def listed(values: dict[str, list[float]]) -> str:
    return "\n".join(
        f"{', '.join(f'{v:g}' for v in of) or 'NO DATA':<40} {expression}"
        for expression, of in values.items()
    )


def test_every_expression_of_the_board_has_data(watched, capsys):
    with capsys.disabled():
        print(f"\n{listed(watched.panels)}")
    without = [expression for expression, values in watched.panels.items() if not values]
    assert not without, "no data for:\n" + "\n".join(without)
    assert len(watched.panels) > 50


def test_what_every_alert_compares_has_data(watched, capsys):
    with capsys.disabled():
        print(f"\n{listed(watched.alerts)}")
    without = [expression for expression, values in watched.alerts.items() if not values]
    assert not without, "no data for:\n" + "\n".join(without)


@pytest.mark.parametrize("name", ["learner/reverse_kl", "actors/miou", "eval/miou"])
def test_what_prometheus_scraped_is_what_the_run_wrote(watched, name):
    scraped = watched.history[name.replace("/", "_")]
    wrote = [m[name] for m in metrics_of(watched.folder) if name in m]
    assert scraped
    assert all(min(abs(s - w) for w in wrote) < 1e-6 for s in scraped), (scraped, wrote)
    assert name != "learner/reverse_kl" or len(set(scraped)) > 1, "it never moved"


def test_the_step_goes_on_to_where_the_run_is(watched):
    steps, last = watched.history["step"], metrics_of(watched.folder)[-1]["step"]
    assert steps == sorted(steps) and steps[0] < steps[-1] <= last + 1, (steps, last)


def test_seconds_without_a_step_grow_while_no_step_ends(watched):
    assert watched.still_s > ROUND_TRIP_S


def test_decoding_is_counted_where_it_is_done(watched):
    (shares,) = (shares for e, shares in watched.panels.items() if "frame_cache_reads" in e)
    assert len(shares) == len(READERS)
    assert all(0 <= share <= 1 for share in shares)


def test_every_process_says_what_happened_as_json_with_run_step_and_role(watched):
    events = [json.loads(line) for line in (watched.folder / "log.jsonl").read_text().splitlines()]
    dropped = [e for e in events if "train00003.mp4" in e["message"]]
    assert dropped and all(e["message"] in watched.output for e in dropped), "the terminal says it too"
    assert {(e["role"], e["run"], e["level"]) for e in dropped} == {("driver", "watched", "WARNING")}
    assert [e["step"] for e in events] == sorted(e["step"] for e in events) and events[-1]["step"] >= 6
    assert events[-1]["level"] == "ERROR" and "stopped by SIGTERM at step" in events[-1]["message"]
    roles = {}
    for file in (watched.ray_dir / "session_latest" / "logs").glob("worker-*.err"):
        for line in file.read_text().splitlines():
            if line.startswith('{"level"'):
                event = json.loads(line)
                roles.setdefault(event["role"], []).append(event)
    assert set(roles) == {"actor-0", "learner-0", "curriculum", "teacher-teacher"}
    assert all(
        e["run"] == "watched" and e["time"] and e["level"] and e["message"]
        for of in roles.values()
        for e in of
    )
    assert max(e["step"] or 0 for e in roles["actor-0"]) >= 6
