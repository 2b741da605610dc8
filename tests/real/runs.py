"""launch.py as a process of its own: started, watched from outside, ended; and what its run folder holds."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from demo.clips import write_split
from video_opd import ROOT

PATIENCE_S = 600.0
GROUPS = 6
TITLES = {  # of Ray's processes, as `ps` shows them
    "actor": "ray::RolloutActor",
    "replica": "ray::ServeReplica",
    "scheduler": "ray::SchedulerActor",
    "rank": "ray::LearnerRank",
}
SMALL = [  # what makes steps of a tenth of a second
    f"groups_per_step={GROUPS}",
    "rollout.prompts_per_call=3",
    "rollout.prompts_per_result=1",
    "rollout.max_response_tokens=6",
    "learner.micro_batch=3",
    "data.eval.max_prompts=4",
    "request_timeout_s=120",
    "start_timeout_s=600",
]

SHRUNK = [*SMALL, "max_policy_lag=0", "checks.max_logprob_gap=0.001"]


def write_data(folder: Path, split: str, count: int, levels: tuple[str, ...]) -> list[str]:
    """Writes clips below `folder` and returns the overrides that name them."""
    write_split(folder / split, split, count, levels)
    names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    return [f"data.{split}.{key}={folder / split / name}" for key, name in names.items()]


def kept_port() -> socket.socket:
    """While it is open no other process is given its port. A server may listen there."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("", 0))
    return kept


def run_module(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in the checkout, to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=env
    )


def run_launch(*arguments: str) -> subprocess.CompletedProcess:
    """launch.py to its end."""
    return run_module("launch.py", *arguments)


def start(
    folder: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    terminal: int | None = None,
    program: Sequence[str] = ("launch.py",),
) -> subprocess.Popen:
    """launch.py on a Ray of its own, with its output in folder/output.txt, in a process group of its own.

    `terminal`: the end of a pseudo-terminal in whose foreground it is to run. `program`: what stands in for
    launch.py.
    """
    options: dict[str, Any] = {"stderr": subprocess.STDOUT, "start_new_session": True, "env": env}
    if terminal is not None:
        options |= {"stdin": terminal, "preexec_fn": _take_terminal}
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, "-u", *program, "--address", "local", *arguments]
        return subprocess.Popen(command, stdout=output, cwd=ROOT, **options)


def _take_terminal() -> None:
    """Makes standard input the terminal of this session, whose Ctrl-C counts even under nohup."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes(run: subprocess.Popen, role: str) -> list[psutil.Process]:
    """The run's own processes of a role, but for stopped ones."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            title, status = " ".join(process.cmdline()), process.status()
        except psutil.NoSuchProcess:
            continue
        if title.startswith(TITLES[role]) and status != psutil.STATUS_STOPPED:
            found.append(process)
    return found


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Ray's agents look for their parent every 2 s, five times."""
    deadline = time.monotonic() + PATIENCE_S
    while left := [p for p in processes if _lives(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trajectories_of(run: Path) -> list[dict]:
    files = sorted((run / "trajectories").glob("*.arrows"))
    return [row for f in files for row in pa.ipc.open_stream(pa.OSFile(str(f))).read_all().to_pylist()]


def last_step(folder: Path) -> int:
    """-1 before the first."""
    path = folder / "metrics.jsonl"
    return metrics_of(folder)[-1]["step"] if path.exists() and path.read_text().endswith("\n") else -1


def wait_for(condition: Callable[[], object], run: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def end(run: subprocess.Popen, folder: Path, expected: int = 0) -> str:
    """Waits for the end and returns what was printed. What is left of a run that fails is killed."""
    try:
        code = run.wait(PATIENCE_S)
    finally:
        kill_all(run)
    output = (folder / "output.txt").read_text()
    assert code == expected, output[-4000:]
    return output


def kill_all(run: subprocess.Popen) -> None:
    """SIGKILL for the driver and everything below it."""
    try:
        everybody = family(run.pid)
    except psutil.NoSuchProcess:
        everybody = []
    for process in everybody:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    run.wait(PATIENCE_S)


def environment(**changes: str) -> dict[str, str]:
    """That of another terminal: nothing of this process's Ray."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changes
