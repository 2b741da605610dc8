"""One run: watched by a real Prometheus, scaled and attacked from other terminals, stopped by Ctrl-C.

The tests follow one another. `live` is the run under way: it steps slowly, and then not at all, its ranks
suspended, to leave the processor to the tests. `ended` is what is left of it.
"""

import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.conftest import require_prometheus
from tests.real.prometheus import Prometheus, alert_expressions, board_expressions, listed
from tests.real.runs import (
    GROUPS,
    PATIENCE_S,
    SMALL,
    end,
    environment,
    family,
    kill_all,
    last_step,
    metrics_of,
    processes,
    run_module,
    start,
    trajectories_of,
    wait_for,
    wait_until_gone,
    write_data,
)
from video_opd.files.checkpoint import checkpoint_steps

UNHURRIED = """
import asyncio, launch, sys
learn_step = launch.learn_step
async def unhurried(*arguments):
    await asyncio.sleep(2)
    await learn_step(*arguments)
launch.learn_step = unhurried
sys.exit(launch.main(sys.argv[1:]))
"""
REPORT_S = 5
READERS = ("actor", "teacher", "learner")  # of clips
ROUND_TRIP_S = 8  # beyond it a gauge that stands still must have grown
HISTORY = ("learner_reverse_kl", "step", "actors_miou", "eval_miou")
INTO_RAY = "import ray, sys; ray.init(address=sys.argv[1]); print('in', ray.cluster_resources()['CPU'])"
COMMANDS = (  # what is typed in other terminals at once, time after time: the exit code, a part of the answer
    {
        "teacher_service scale 2": (0, "2 wanted, 2 running"),
        "actors scale 2": (0, "2 running, 2 wanted"),
        "actors status --run another": (2, "run another is not on this Ray; running: live"),
        "actors status --address 127.0.0.1:1": (2, "no Ray answers at 127.0.0.1:1"),
    },
    {
        "actors status": (0, "2 running, 2 wanted"),
        "teacher_service status": (0, "2 wanted, 2 running"),
        "actors scale 0": (2, "scale 0: a run that samples needs at least 1 rollout actor"),
        "actors scale 1000": (
            2,
            "1000 are asked for, but the nodes of this Ray hold 64 of the resource `rollout`",
        ),
    },
    {
        "teacher_service scale 1": (0, "1 wanted, 1 running"),
        "actors scale 1": (0, "1 running, 1 wanted"),
    },
)
EXPECTED = {command: answer for of_one_time in COMMANDS for command, answer in of_one_time.items()}


@dataclass(frozen=True)
class Live:
    """The run, with a home of its own, where its token is; and what was seen of it."""

    process: subprocess.Popen
    terminal: int
    home: Path
    ray_dir: Path
    address: str
    dashboard: str
    answers: dict[str, subprocess.CompletedProcess]
    panels: dict[str, list[float]]  # expression: its values
    alerts: dict[str, list[float]]
    history: dict[str, list[float]]  # metric: what Prometheus scraped of it
    still_s: float  # seconds since the last step, while no step can end

    @property
    def folder(self) -> Path:
        return self.home / "live"

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"


@pytest.fixture(scope="module")
def live(overrides, tmp_path_factory) -> Iterator[Live]:
    require_prometheus()
    home = tmp_path_factory.mktemp("live")
    options = [
        *(*SMALL, "num_steps=1000000", "max_policy_lag=1", "eval_every=3"),
        *(f"runs_dir={home}", "run_name=live", "request_timeout_s=400"),
        # a cache too small for all clips, so that they are decoded again and again
        *(f"video.cache_dir={home / 'frames'}", "video.cache_bytes=500000"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_tmp:
        env = environment(
            HOME=str(home), RAY_TMPDIR=ray_tmp, RAY_metrics_report_interval_ms=str(REPORT_S * 1000)
        )
        data = write_data(home, "train", 16, ("colour", "shape"))
        terminal, its_end = pty.openpty()
        program = ("-c", UNHURRIED)
        run = start(home, *overrides, *data, *options, env=env, terminal=its_end, program=program)
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), Path(ray_tmp) / "ray")
        try:
            yield _look_at(run, terminal, home, Path(ray_tmp) / "ray", prometheus)
        except BaseException:
            print((home / "output.txt").read_text()[-4000:])
            raise
        finally:
            kill_all(run)
            prometheus.stop()


def counted(folder: Path) -> tuple[float, float]:
    """Replicas and actors, as the last step counted them."""
    last = metrics_of(folder)[-1]
    return last["teacher/replicas"], last["actors/running"]


def _look_at(run: subprocess.Popen, terminal: int, home: Path, ray_dir: Path, prometheus: Prometheus) -> Live:
    output = home / "output.txt"
    wait_for(lambda: "Ray dashboard" in output.read_text(), run, "Ray, after the start-up checks")
    broken = home / "train" / "videos" / "train00003.mp4"
    broken.write_bytes(broken.read_bytes()[:1000])
    ((dashboard, address),) = re.findall(r"Ray dashboard: (\S+), address (\S+)", output.read_text())
    wait_for(lambda: last_step(home / "live") >= 2, run, "step 2")
    answers: dict[str, subprocess.CompletedProcess] = {}
    of_home = environment(HOME=str(home))
    for commands, of_each in zip(COMMANDS, (2, 2, 1), strict=True):
        with ThreadPoolExecutor() as terminals:
            typed = [[*c.split(), *([] if "--address" in c else ["--address", address])] for c in commands]
            done = terminals.map(lambda words: run_module("-m", *words, env=of_home), typed)
            answers |= zip(commands, done, strict=True)
        wait_for(lambda n=of_each: counted(home / "live") == (n, n), run, f"a step with {of_each} of each")
    at = max(6, last_step(home / "live") + 1)
    wait_for(lambda: last_step(home / "live") > at, run, "a step after all commands")

    wait_for(prometheus.is_up, run, "answer of Prometheus")
    panels, alerts = board_expressions("live"), alert_expressions()
    panels.append('ray_video_opd_dropped_prompts{reason="broken"} > 0')
    reads = next(e for e in panels if "frame_cache_reads" in e)
    moved = 'changes(ray_video_opd_learner_reverse_kl{run="live"}[10m]) > 0'
    prometheus.wait_for([f"count({reads}) >= {len(READERS)}", *panels, *alerts, moved], run)
    of_panels, of_alerts = ({e: prometheus.values(e) for e in of} for of in (panels, alerts))
    history = {name: prometheus.history(f'ray_video_opd_{name}{{run="live"}}[10m]') for name in HISTORY}

    for rank in processes(run, "rank"):
        rank.suspend()
    still = 'max(ray_video_opd_seconds_since_step{run="live"})'
    prometheus.wait_for([f"{still} > {ROUND_TRIP_S}"], run)
    still_s = max(prometheus.values(still), default=0.0)
    seen = (answers, of_panels, of_alerts, history, still_s)
    return Live(run, terminal, home, ray_dir, address, dashboard, *seen)


@pytest.mark.parametrize("command", EXPECTED)
def test_commands_change_the_run_and_say_so_and_what_cannot_be_is_one_line(live, command):
    code, said = EXPECTED[command]
    answer = live.answers[command]
    assert answer.returncode == code, answer.stderr
    if code == 0:
        assert said in answer.stdout
    else:
        assert answer.stderr.startswith("error: ") and said in answer.stderr
        assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("of", ["panels", "alerts"])
def test_every_expression_of_the_board_and_of_the_alerts_has_data(live, of, capsys):
    values = getattr(live, of)
    with capsys.disabled():
        print(f"\n{listed(values)}")
    without = [expression for expression, found in values.items() if not found]
    assert not without, "no data for:\n" + "\n".join(without)
    assert len(live.panels) > 50


def test_seconds_without_a_step_grow_while_no_step_ends(live):
    assert live.still_s > ROUND_TRIP_S


def test_decoding_is_counted_where_it_is_done(live):
    (shares,) = (shares for e, shares in live.panels.items() if "frame_cache_reads" in e)
    assert len(shares) == len(READERS)
    assert all(0 <= share <= 1 for share in shares)


# Who gets into the run's Ray, and what it listens on.


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("wrong") / "token"
    path.write_text("0" * 64)
    return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))


def is_loopback(address: str) -> bool:
    ip = ip_address(address)
    return (ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip).is_loopback


def called(port: int, token: str | None) -> grpc.StatusCode:
    """The answer of a port to a call of Serve's; a channel that is not connected yet is waited for."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=PATIENCE_S, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            status: Any = error
            return status.code()
    return grpc.StatusCode.OK


def test_a_run_of_this_machine_listens_on_loopback_or_wants_the_token(live):
    """Ray's processes, the ranks and the engines. Serve has no HTTP proxy."""
    listening, names = [], []
    driver = psutil.Process(live.process.pid)
    for process in [driver, *driver.children(recursive=True)]:
        try:
            # a program's path, or a title that Ray gave
            names.append((process.cmdline() or [process.name()])[0])
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        bound = [s.laddr for s in sockets if s.status == psutil.CONN_LISTEN]
        listening += [(names[-1], place.ip, place.port) for place in bound]
    beyond = [place for place in listening if not is_loopback(place[1])]
    assert all("ServeReplica" in name for name, *_ in beyond), beyond
    for (
        _,
        _,
        port,
    ) in beyond:  # for calls of other deployments; Serve binds it to every address, with the token
        assert called(port, None) == called(port, "0" * 64) == grpc.StatusCode.UNAUTHENTICATED
        assert called(port, live.token.read_text()) != grpc.StatusCode.UNAUTHENTICATED
    for part in ("gcs_server", "raylet", "LearnerRank", "RolloutActor"):
        assert any(part in name for name, *_ in listening), f"{part} listens nowhere: {listening}"
    assert any("ServeReplica" in name for name in names) and not any("Proxy" in name for name in names)
    assert not any("ray::IDLE" in name for name in names), "nothing uses it"


def test_the_token_is_made_for_its_owner_alone(live):
    assert len(live.token.read_text()) >= 32 and stat.S_IMODE(live.token.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        *((kind, "actors") for kind in ("none", "wrong", "disabled", "no such file", "unknown mode")),
        ("wrong", "launch.py"),
    ],
)
def test_a_client_without_the_token_is_refused_in_one_line(live, wrong, overrides, command, kind, tmp_path):
    env, said = {
        "none": (environment(HOME=str(tmp_path)), "wants its token, and there is none here"),
        "wrong": (wrong, "wants another token than the one here: copy"),
        "disabled": (environment(RAY_AUTH_MODE="disabled"), "wants its token, and RAY_AUTH_MODE=disabled"),
        "no such file": (
            wrong | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "x")},
            "the token cannot be read: RAY_AUTH_TOKEN_PATH",
        ),
        "unknown mode": (
            environment(RAY_AUTH_MODE="tokn"),
            "RAY_AUTH_MODE=tokn: set it to token or disabled",
        ),
    }[kind]
    program = ["-m", "actors", "status"]
    if command == "launch.py":
        program = ["launch.py", *overrides, *SMALL, f"runs_dir={tmp_path}", "run_name=refused"]
    done = run_module(*program, "--address", live.address, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["disabled", "wrong"])
def test_ray_itself_refuses_them(live, wrong, kind, tmp_path):
    """Ray's own client, which tries again and again, gets the server's refusal."""
    env = wrong if kind == "wrong" else environment(RAY_AUTH_MODE="disabled")
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    said = tmp_path / "said"
    run = ["-c", INTO_RAY, live.address]
    with said.open("w") as output:
        asking = subprocess.Popen([sys.executable, *run], env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "Unauthenticated" not in said.read_text() and asking.poll() is None:
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
    finally:
        asking.kill()
        asking.wait()
    assert "InvalidAuthToken: Authentication token is missing or incorrect" in said.read_text()
    assert "in " not in said.read_text().splitlines()


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
def test_the_dashboard_answers_only_who_has_the_token(live, path):
    assert answer(live.dashboard + path, None) == 401
    assert answer(live.dashboard + path, "0" * 64) == 403
    assert answer(live.dashboard + path, live.token.read_text()) == 200


# What is left of it.


@pytest.fixture(scope="module")
def ended(live) -> str:
    """What the run printed until Ctrl-C in its terminal ended it."""
    for rank in psutil.Process(live.process.pid).children(recursive=True):
        if rank.status() == psutil.STATUS_STOPPED:
            rank.resume()
    at = last_step(live.folder)
    wait_for(lambda: last_step(live.folder) > at, live.process, "a step after the ranks go on")
    everybody = family(live.process.pid)
    os.write(live.terminal, b"\x03")
    said = end(live.process, live.home, 128 + signal.SIGINT)
    wait_until_gone(everybody)
    return said


def test_ctrl_c_in_its_terminal_ends_the_run_with_a_checkpoint_and_one_line(live, ended):
    (step,) = checkpoint_steps(live.folder)
    *said, last = ended.partition("SIGINT: stopping after the step under way")[2].splitlines()
    assert last == f"stopped by SIGINT at step {step}: continue with --resume {live.folder}"
    assert not [line for line in said if line.startswith(("warning", "Traceback", "[2"))]
    assert [m["step"] for m in metrics_of(live.folder)] == list(range(step))


def test_no_score_is_lost_or_repeated_and_the_pools_history_is_in_the_metrics(live, ended):
    rows, metrics = trajectories_of(live.folder), metrics_of(live.folder)
    assert [m["step"] for m in metrics] == list(range(len(metrics)))
    assert Counter(r["step"] for r in rows) == dict.fromkeys(range(len(metrics)), GROUPS)
    assert len({r["trajectory_id"] for r in rows}) == len(rows)
    assert all(len(r["teacher_logprobs"]) == len(r["response_token_ids"]) for r in rows)
    assert metrics[-1]["teacher/scored_tokens"] >= sum(len(r["response_token_ids"]) for r in rows)
    for name, most in (("teacher/replicas", 2), ("actors/running", 2)):
        history = [m[name] for m in metrics if name in m]
        assert history[0] == 1 and max(history) == most and history[-1] == 1, (name, history)
    assert all(m["actors/lost"] == 0 for m in metrics)


@pytest.mark.parametrize("name", ["learner/reverse_kl", "actors/miou", "eval/miou"])
def test_what_prometheus_scraped_is_what_the_run_wrote(live, ended, name):
    scraped = live.history[name.replace("/", "_")]
    wrote = [m[name] for m in metrics_of(live.folder) if name in m]
    assert scraped
    assert all(min(abs(s - w) for w in wrote) < 1e-6 for s in scraped), (scraped, wrote)
    assert name != "learner/reverse_kl" or len(set(scraped)) > 1, "it never moved"


def test_the_step_goes_on_to_where_the_run_is(live, ended):
    steps, last = live.history["step"], metrics_of(live.folder)[-1]["step"]
    assert steps == sorted(steps) and steps[0] < steps[-1] <= last + 1, (steps, last)


def test_every_process_says_what_happened_as_json_with_run_step_and_role(live, ended):
    events = [json.loads(line) for line in (live.folder / "log.jsonl").read_text().splitlines()]
    dropped = [e for e in events if "train00003.mp4" in e["message"]]
    assert dropped and all(e["message"] in ended for e in dropped), "the terminal says it too"
    assert {(e["role"], e["run"], e["level"]) for e in dropped} == {("driver", "live", "WARNING")}
    assert [e["step"] for e in events] == sorted(e["step"] for e in events) and events[-1]["step"] >= 6
    assert events[-1]["level"] == "ERROR" and "stopped by SIGINT at step" in events[-1]["message"]
    roles: dict[str, list[dict]] = {}
    for file in (live.ray_dir / "session_latest" / "logs").glob("worker-*.err"):
        for line in file.read_text().splitlines():
            if line.startswith('{"level"'):
                event = json.loads(line)
                roles.setdefault(event["role"], []).append(event)
    assert set(roles) == {"actor-0", "actor-1", "learner-0", "curriculum", "teacher-teacher"}
    said = [event for of in roles.values() for event in of]
    assert all(e["run"] == "live" and e["time"] and e["level"] and e["message"] for e in said)
    assert max(e["step"] or 0 for e in said if e["role"].startswith("actor-")) >= 6
