"""Who gets into a Ray, and what it listens on: a real run of this machine alone, real clients with and without its token."""

import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.real.test_chaos import ROOT, kill_all, last_step, wait_for

PATIENCE_S = 60.0
SMALL = ["num_steps=5000", "groups_per_step=4", "rollout.prompts_per_call=2", "rollout.max_response_tokens=6"]
SMALL += ["learner.micro_batch=4", "data.eval.max_prompts=1"]
INTO_RAY = "import ray, sys; ray.init(address=sys.argv[1]); print('in', ray.cluster_resources()['CPU'])"


@dataclass(frozen=True)
class LocalRun:
    """launch.py under way, with a home of its own, where its token is."""

    process: subprocess.Popen
    home: Path
    address: str
    dashboard: str

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changes


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Iterator[LocalRun]:
    folder = tmp_path_factory.mktemp("open")
    options = [*SMALL, f"runs_dir={folder}", "run_name=run", "learner.world_size=2"]
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-u", str(ROOT / "launch.py"), "--address", "local", *overrides, *options]
        env = environment(HOME=str(folder))
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        wait_for(lambda: last_step(folder / "run") >= 0, process, "step 0")
        line = next(
            line
            for line in (folder / "output.txt").read_text().splitlines()
            if line.startswith("Ray dashboard: ")
        )
        dashboard, address = line.removeprefix("Ray dashboard: ").split(", address ")
        process.send_signal(
            signal.SIGSTOP
        )  # the processor is the tests'; Ray and the run's other processes go on
        yield LocalRun(process, folder, address, dashboard)
    except BaseException:
        print((folder / "output.txt").read_text()[-4000:])
        raise
    finally:
        kill_all(process)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("wrong") / "token"
    path.write_text("0" * 64)
    return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))


def client(env: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def is_loopback(address: str) -> bool:
    ip = ip_address(address)
    return (ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip).is_loopback


def called(port: int, token: str | None) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=PATIENCE_S, metadata=(("authorization", f"Bearer {token}"),) if token else ())
        except grpc.RpcError as error:
            status: Any = error
            return status.code()
    return grpc.StatusCode.OK


def test_a_run_of_this_machine_listens_on_loopback_or_wants_the_token(run):
    """Ray's processes, the ranks, the engines, whatever they are; but for one of Serve's, which has no HTTP proxy."""
    listening, names = [], []
    for process in [
        psutil.Process(run.process.pid),
        *psutil.Process(run.process.pid).children(recursive=True),
    ]:
        try:
            names.append(
                (process.cmdline() or [process.name()])[0]
            )  # a program's path, or a title that Ray gave
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        listening += [
            (names[-1], s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN
        ]
    beyond = [place for place in listening if not is_loopback(place[1])]
    assert all("ServeReplica" in name for name, *_ in beyond), beyond
    for (
        _,
        _,
        port,
    ) in beyond:  # the calls of other deployments, which Serve binds to every address: it wants the token
        assert called(port, None) == called(port, "0" * 64) == grpc.StatusCode.UNAUTHENTICATED
        assert called(port, run.token.read_text()) != grpc.StatusCode.UNAUTHENTICATED
    for part in ("gcs_server", "raylet", "LearnerRank", "RolloutActor"):
        assert any(part in name for name, *_ in listening), f"{part} listens nowhere: {listening}"
    assert any("ServeReplica" in name for name in names) and not any("Proxy" in name for name in names)


def test_the_token_is_made_for_its_owner_alone(run):
    assert len(run.token.read_text()) >= 32 and stat.S_IMODE(run.token.stat().st_mode) == 0o600


def test_a_client_with_the_token_gets_in(run):
    done = client(environment(HOME=str(run.home)), "-m", "actors", "status", "--address", run.address)
    assert (done.returncode, done.stderr) == (0, "") and "run" in done.stdout


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (kind, ["-m", "actors", "status"])
        for kind in ("none", "wrong", "disabled", "no such file", "unknown mode")
    ]
    + [(kind, ["launch.py"]) for kind in ("none", "wrong")],
    ids=lambda value: value if isinstance(value, str) else value[0].strip("-"),
)
def test_a_client_without_the_token_is_refused_in_one_line(run, wrong, overrides, command, kind, tmp_path):
    env, said = {
        "none": (
            environment(HOME=str(tmp_path)),
            "wants its token, and there is none here: copy the head's ~/.ray/auth_token",
        ),
        "wrong": (wrong, "wants another token than the one here: copy"),
        "disabled": (
            environment(RAY_AUTH_MODE="disabled"),
            "wants its token, and RAY_AUTH_MODE=disabled, so that none is sent: unset it",
        ),
        "no such file": (
            wrong | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "x")},
            f"the token cannot be read: {'RAY_AUTH_TOKEN_PATH'}",
        ),
        "unknown mode": (
            environment(RAY_AUTH_MODE="tokn"),
            "RAY_AUTH_MODE=tokn: set it to token or disabled, or unset it",
        ),
    }[kind]
    more = (
        [*overrides, *SMALL, f"runs_dir={tmp_path}", "run_name=refused"] if command == ["launch.py"] else []
    )
    began = time.monotonic()
    done = client(env, *command, "--address", run.address, *more)
    assert done.returncode == 2 and time.monotonic() - began < PATIENCE_S
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["disabled", "wrong"])
def test_ray_itself_refuses_them(run, wrong, kind, tmp_path):
    """Not this project's check alone: Ray's own client, which tries again and again, gets the server's answer."""
    env = wrong if kind == "wrong" else environment(RAY_AUTH_MODE="disabled")
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with (tmp_path / "said").open("w") as output:
        asking = subprocess.Popen(
            [sys.executable, "-c", INTO_RAY, run.address], env=env, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while (
            "Unauthenticated" not in (tmp_path / "said").read_text()
            and asking.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
    finally:
        asking.kill()
        asking.wait()
    said = (tmp_path / "said").read_text()
    assert (
        "InvalidAuthToken: Authentication token is missing or incorrect" in said
        and "in " not in said.splitlines()
    )


def answer(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=PATIENCE_S
        ) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path", ["/api/jobs/", "/nodes?view=summary", "/api/cluster_status", "/api/serve/applications/"]
)
def test_the_dashboard_answers_only_who_has_the_token(run, path):
    assert answer(run.dashboard + path, None) == 401
    assert answer(run.dashboard + path, "0" * 64) == 403
    assert answer(run.dashboard + path, run.token.read_text()) == 200
