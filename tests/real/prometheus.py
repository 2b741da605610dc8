"""A real Prometheus with the project's own files, and the expressions of its board and alerts."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.real.runs import kept_port
from video_opd import ROOT

PATIENCE_S = 600.0
SCRAPE_S, RATE = 2, "1m"


class Prometheus:
    """Debian's, with deploy/prometheus.yml but for where Ray writes, how often it scrapes, and its port."""

    def __init__(self, folder: Path, ray_dir: Path):
        config = (ROOT / "deploy/prometheus.yml").read_text()
        for ours, theirs in (("/tmp/ray", str(ray_dir)), ("interval: 10s", f"interval: {SCRAPE_S}s")):
            assert ours in config
            config = config.replace(ours, theirs)
        (folder / "prometheus.yml").write_text(config)
        shutil.copy(ROOT / "deploy/alerts.yml", folder)
        self._port = kept_port()
        self.address = f"127.0.0.1:{self._port.getsockname()[1]}"
        options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "output.txt").open("w") as output:
            command = ["prometheus", *options, f"--web.listen-address={self.address}"]
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def query(self, expression: str) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """Those that are numbers."""
        return [v for r in self.query(expression) if math.isfinite(v := float(r["value"][1]))]

    def history(self, expression: str) -> list[float]:
        """All samples of a range."""
        return [float(v) for r in self.query(expression) for _, v in r["values"]]

    def is_up(self) -> bool:
        try:
            return not self.query("absent(up)")
        except OSError:
            return False

    def wait_for(self, expressions: Sequence[str], run: subprocess.Popen) -> None:
        """Until all have data, or patience ends: the tests then say what is missing."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(self.values(e) for e in expressions) and time.monotonic() < deadline:
            assert run.poll() is None, "the run ended before every expression had data"
            time.sleep(1.0)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._port.close()


def board_expressions(run: str) -> list[str]:
    board = json.loads((ROOT / "deploy/grafana/video_opd.json").read_text())
    expressions = [t["expr"] for p in board["panels"] for t in p.get("targets", [])]
    return [e.replace("$__rate_interval", RATE).replace("$run", run) for e in expressions]


def alert_expressions() -> list[str]:
    """Without the comparison: nothing is wrong with the run, but what is compared must be there."""
    rules = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0]["rules"]
    return [re.split(r" [<>]=? ", rule["expr"])[0] for rule in rules]


def listed(values: dict[str, list[float]]) -> str:
    rows = ((", ".join(f"{v:g}" for v in found) or "NO DATA", e) for e, found in values.items())
    return "\n".join(f"{found:<40} {expression}" for found, expression in rows)
