"""What a run asks of a cluster, what is missing, and which cluster is meant."""

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.serve._private.long_poll import LongPollClient

from driver.start_ray import Need, describe_missing, leave_ray, needs_of, too_large
from learner.file_transfer import PART_BYTES, FilePart, read_parts, write_part
from tests.real.runs import wait_until_gone
from video_opd.cluster import join as cluster
from video_opd.config_file import load_config
from video_opd.errors import ClusterError, ConfigError

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def needs(**counts: int) -> list[Need]:
    return [Need(role, count, {role: 1, "GPU": 1}, f"{role}.count") for role, count in counts.items()]


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [
        ([], "learner: 0 of 2, teacher: 0 of 4"),
        ([{"learner": 2, "GPU": 2}, *[{"teacher": 1, "GPU": 1}] * 2], "teacher: 2 of 4"),
        ([{"learner": 2, "GPU": 2}, {"teacher": 4, "GPU": 4}], ""),
        (
            [{"learner": 2, "GPU": 1}, {"GPU": 8}, *[{"teacher": 1, "GPU": 1}] * 4],
            "learner: 1 of 2",
        ),  # not one node's role, another's GPU
        ([{"learner": 2, "teacher": 4, "GPU": 3}], "teacher: 1 of 4"),  # one GPU is not given twice
    ],
)
def test_what_is_missing_is_counted_in_processes_that_have_all_they_take_on_one_node(nodes, missing):
    assert describe_missing(needs(learner=2, teacher=4), nodes) == missing


def test_places_are_counted_on_a_copy():
    node = {"learner": 1.0, "GPU": 1.0}
    assert describe_missing(needs(learner=1), [node]) == ""
    assert node == {"learner": 1.0, "GPU": 1.0}


def test_a_config_asks_for_its_ranks_actors_and_replicas():
    options = [
        "learner.world_size=3",
        "learner.num_gpus=1",
        "rollout.num_actors=2",
        "rollout.num_gpus=1",
        "rollout.tensor_parallel=8",
        "teacher_pool.num_replicas=4",
    ]
    parts = [
        "teacher_pool.engine=vllm",
        "teacher_pool.tensor_parallel=2",
        "teacher_pool.num_gpus=1",
        "loss.kind=opd",
    ]
    learner, rollout, teacher = needs_of(load_config(DEMO, options + parts))
    assert (learner.count, learner.each) == (3, {"learner": 1, "CPU": 0.5, "GPU": 1})
    assert (rollout.count, rollout.each) == (2, {"rollout": 1, "CPU": 4, "GPU": 8})
    assert (teacher.count, teacher.each) == (
        4,
        {"teacher": 1, "CPU": 1.0, "GPU": 2},
    )  # both parts on one node
    assert str(teacher) == "teacher (each teacher 1, CPU 1, GPU 2; teacher_pool.num_replicas)"


def test_what_no_node_could_hold_is_named_however_many_nodes_there_are():
    eight = Need("rollout", 2, {"rollout": 1, "GPU": 8}, "rollout.num_actors")
    nodes = [{"rollout": 4, "teacher": 4, "GPU": 4}] * 4
    named = "rollout (each rollout 1, GPU 8; rollout.num_actors)"
    assert too_large([eight, *needs(teacher=40)], nodes) == named
    assert too_large([eight], [*nodes, {"rollout": 1, "GPU": 8}]) == ""


def test_what_nobody_asks_is_not_waited_for():
    config = load_config(
        DEMO, ["loss.kind=sft", "loss.clamp=null", "curriculum.kind=uniform", "rollout.num_actors=0"]
    )
    assert [need.role for need in needs_of(config)] == ["learner"]


@pytest.fixture
def listening():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_cluster_to_join_is_the_one_that_is_named_or_the_one_this_machine_is_in(monkeypatch, listening):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = {"address": listening}
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: started["address"])
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())
    assert (
        cluster.cluster_to_join(None)
        == cluster.cluster_to_join("auto")
        == cluster.cluster_to_join(listening)
        == listening
    )
    assert cluster.cluster_to_join("local") is None
    with pytest.raises(ConfigError, match=r"no Ray answers at 127\.0\.0\.1:1 .*: give --address"):
        cluster.cluster_to_join("127.0.0.1:1")
    started["address"] = "127.0.0.1:1"  # of a Ray that is gone
    assert cluster.cluster_to_join(None) is None
    with pytest.raises(ConfigError, match="no Ray runs on this machine"):
        cluster.cluster_to_join("auto")
    monkeypatch.setenv("RAY_ADDRESS", listening)
    assert cluster.cluster_to_join(None) == listening
    assert cluster.cluster_to_join("local") is None


class Node:
    """Stands in for ray.init's node."""

    def __init__(self, address: str, processes: dict[str, subprocess.Popen]):
        self.gcs_address, self._processes, self.raylet_socket_name = address, processes, "/tmp/a-socket"
        self.all_processes = {kind: [SimpleNamespace(process=p)] for kind, p in processes.items()}

    def dead_processes(self) -> list[tuple[str, subprocess.Popen]]:
        return [(kind, p) for kind, p in self._processes.items() if p.poll() is not None]


@pytest.fixture
def high_descriptors(monkeypatch) -> Iterator[None]:
    """A process that has many files open, as the driver of a large cluster has: select takes only 1024."""
    (soft, hard), opened = resource.getrlimit(resource.RLIMIT_NOFILE), os.pidfd_open
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    monkeypatch.setattr(os, "pidfd_open", lambda pid: fcntl.fcntl(opened(pid), fcntl.F_DUPFD, 1500))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("high_descriptors")
def test_a_process_of_the_own_ray_that_ends_is_named_at_once_and_the_rest_is_killed(monkeypatch):
    names = ("gcs_server", "raylet", "dashboard")
    command = ["sh", "-c", "sleep 600 & wait"]
    processes = {name: subprocess.Popen(command, start_new_session=True) for name in names}
    monkeypatch.setattr(cluster.ray_worker, "_global_node", Node("", processes))
    lifeline = cluster.Lifeline()
    assert lifeline.wait(0.0) is None
    children = []
    for shell in map(psutil.Process, (p.pid for p in processes.values())):
        while not shell.children():
            time.sleep(0.01)
        children += shell.children()
    processes["dashboard"].kill()
    processes["dashboard"].wait()
    assert lifeline.wait(0.0) is None, "a run can do without it"
    processes["raylet"].terminate()
    assert lifeline.wait(60.0) == "its raylet was ended by SIGTERM"
    cluster.kill_own_ray()
    assert processes["gcs_server"].wait(60) == -signal.SIGKILL
    wait_until_gone(children)  # also of what ended before


def test_a_joined_ray_is_gone_when_its_head_stays_silent_or_the_raylet_here_ends(monkeypatch, listening):
    monkeypatch.setattr(cluster.ray_worker, "_global_node", Node(listening, {}))
    lifeline = cluster.Lifeline()
    monkeypatch.setattr(cluster, "HEAD_PATIENCE_S", 0.0)
    assert lifeline.wait(0.0) is None
    monkeypatch.setattr(lifeline, "_address", "127.0.0.1:1")
    assert "its head 127.0.0.1:1 has not answered for 0 s" in str(lifeline.wait(0.0))
    monkeypatch.setattr(cluster, "HEAD_PATIENCE_S", 60.0)
    assert lifeline.wait(0.0) is None, "it may be restarted"
    command = [sys.executable, "-c", "import time; time.sleep(600)", "--raylet_socket_name=/tmp/a-socket"]
    raylet = subprocess.Popen(command)
    lifeline = cluster.Lifeline()
    assert lifeline.wait(0.0) is None
    raylet.kill()
    assert lifeline.wait(60.0) == "its raylet on this node ended"
    raylet.wait()


def test_ray_starts_its_processes_in_sessions_of_their_own_and_leaves_signals_to_this_process():
    from ray._private import services, utils

    handler = signal.getsignal(signal.SIGTERM)
    with cluster._apart():
        process = services.ConsolePopen([sys.executable, "-c", "import time; time.sleep(600)"])
        utils.set_sigterm_handler(lambda *_: None)
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        process.kill()
        process.wait()
    assert services.ConsolePopen is type(process), "what others start is as it was"


def test_a_folder_goes_to_another_place_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("learner.file_transfer.PART_BYTES", 4)
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "student").mkdir(parents=True)
    files = {"empty": b"", "short": b"abc", "whole": b"abcdefgh", "student/long": bytes(range(11))}
    for name, data in files.items():
        (source / name).write_bytes(data)
    parts = list(read_parts(source))
    assert max(len(part.data) for part in parts) == 4 < PART_BYTES
    assert [p for p in parts if p.path == "whole"] == [
        FilePart("whole", 0, b"abcd"),
        FilePart("whole", 4, b"efgh"),
    ]
    for part in parts:
        write_part(target, part)
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == files


class SlowRay:
    """Starts a process, as Ray does, and is too slow `times` times."""

    def __init__(self, times: int, message: str = "The current node timed out during startup. This could"):
        self.times, self.message, self.processes = times, message, list[subprocess.Popen]()

    def __call__(self) -> str:
        self.processes.append(subprocess.Popen(["sleep", "600"]))
        if len(self.processes) <= self.times:
            raise Exception(self.message)  # as Ray does
        return "started"

    def running(self) -> list[bool]:
        return [psutil.Process(p.pid).status() != psutil.STATUS_ZOMBIE for p in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def test_a_ray_that_was_too_slow_is_ended_and_started_again(capsys):
    ray, others = SlowRay(2), subprocess.Popen(["sleep", "600"])
    try:
        assert cluster.started_in_time(ray) == "started"
        wait_until(lambda: ray.running() == [False, False, True])
        assert others.poll() is None
    finally:
        ray.end()
        others.kill()
        others.wait()
    assert capsys.readouterr().out.count("started again") == 2


@pytest.mark.parametrize(
    ("message", "raised", "times"),
    [
        ("The current node timed out during startup.", ClusterError, cluster.START_ATTEMPTS),
        ("no memory", Exception, 1),
    ],
)
def test_a_ray_that_never_starts_is_one_line_and_another_error_is_its_own(message, raised, times):
    ray = SlowRay(99, message)
    try:
        with pytest.raises(raised, match="too busy" if raised is ClusterError else message) as caught:
            cluster.started_in_time(ray)
    finally:
        ray.end()
    assert len(ray.processes) == times and "\n" not in str(caught.value)


def test_who_leaves_ray_stops_serves_clients_for_good():
    """An update that arrives after ray.shutdown would make a client poll again, and end the process."""
    client, polls = object.__new__(LongPollClient), []
    client.is_running = True
    client.host_actor = SimpleNamespace(listen_for_change=SimpleNamespace(remote=polls.append))
    leave_ray()
    client._poll_next()
    assert not polls


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
