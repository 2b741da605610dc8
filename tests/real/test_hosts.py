"""`ray up deploy/on_prem.yaml`, `ray exec ... launch.py` and `ray down` on hosts that share data alone."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import not_tested
from tests.real.hosts import NETWORK, USER, Host, HostsUnavailable, hosts
from tests.real.runs import GROUPS, SMALL, last_step, metrics_of, trajectories_of
from video_opd import ROOT

CHECKOUT, FILE = "video-opd", "deploy/on_prem.yaml"
STEPS, PATIENCE_S = 80, 600.0  # of 0.2 s: the loss of a host must be noticed within the run
TITLES = {"learner": "LearnerRank", "rollout": "RolloutActor", "teacher": "ServeReplica"}


def adapt(cluster_file: Path) -> None:
    """This test's addresses, no GPUs, and workers that do not yield to the machine's other tests."""
    text, start = cluster_file.read_text(), "export RAY_AUTH_MODE=token"
    assert text.count("192.0.2.") >= 7 and text.count("EXTRA=gpu") == 1 and text.count(start) == 2
    text = text.replace("192.0.2.", f"{NETWORK}.").replace("EXTRA=gpu", "EXTRA=cpu")
    cluster_file.write_text(text.replace(start, f"{start} RAY_worker_niceness=0"))


def begin(desk: Host, output: Path, *command: str) -> subprocess.Popen:
    """A command in the desk's checkout."""
    with output.open("w") as file:
        return subprocess.Popen(
            desk.command(*command, folder=CHECKOUT), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def at(desk: Host, output: Path, *command: str) -> None:
    """The same, to its end."""
    code = begin(desk, output, *command).wait(PATIENCE_S)
    assert code == 0, f"{command}: {output.read_text()[-6000:]}"


def wait_for(condition: Callable[[], bool], run: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, f"ended with {run.returncode} before {what}"
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.3)


def roles_on(host: Host) -> set[str]:
    processes = host.processes()
    return {role for role, title in TITLES.items() if any(title in line for line in processes)}


def take_down(machines: list[Host], output: Path, folder: Path) -> None:
    """As docs/clusters.md says. Nothing of Ray is left, though the autoscaler was starting a worker again."""
    head, *workers, desk = machines
    key = ("-tt", "-i", f"/home/{USER}/ray_bootstrap_key.pem")
    answers = head.command("ssh", *key, workers[-1].address, "true")  # it was cut off: no route for a while
    deadline = time.monotonic() + PATIENCE_S
    while subprocess.run(answers, stdin=subprocess.DEVNULL, timeout=PATIENCE_S).returncode:
        assert time.monotonic() < deadline, f"{workers[-1].address} did not answer again"
        time.sleep(0.5)
    late = head.command("ssh", *key, workers[-1].address, "sleep 600; ray start")
    starting = subprocess.Popen(late, stdin=subprocess.DEVNULL)
    wait_for(lambda: any("sleep 600" in line for line in workers[-1].processes()), starting, "a late start")
    down = begin(desk, output, "ray", "down", "--yes", FILE)
    wait_for(lambda: not any("monitor.py" in line for line in head.processes()), down, "the autoscaler's end")
    ended = begin(desk, folder / "pkill", "ssh", head.address, 'pkill -f "[r]ay_(bootstrap_key|ssh)"')
    assert ended.wait(PATIENCE_S) == 0
    assert starting.wait(PATIENCE_S) in (-signal.SIGTERM, 255), "255: ssh itself took the signal"
    deadline = time.monotonic() + PATIENCE_S
    while any("sleep 600" in line for line in workers[-1].processes()):
        assert time.monotonic() < deadline, "what the ssh started did not end with it"
        time.sleep(0.3)
    stop = "source ~/.video_opd.sh && ray stop"
    stops = [begin(desk, folder / f"{w.name}.stop", "ssh", w.address, stop) for w in workers]
    assert [of_one.wait(PATIENCE_S) for of_one in (down, *stops)] == [0, 0, 0, 0]
    assert not [line for host in machines[:4] for line in host.processes() if "ray" in line]


@pytest.fixture
def machines(overrides, models, clips, tmp_path):
    """Hosts with the environment that deploy/setup.sh would make, and with models and clips to share."""
    shared = [Path(sys.base_prefix), Path(sys.prefix), models, clips]
    try:
        with hosts(5, tmp_path, shared, hidden=ROOT) as made:
            for host in made:
                environment = tmp_path / host.name / ".venvs"
                environment.mkdir()
                (environment / "video-opd").symlink_to(sys.prefix)
            yield made
    except HostsUnavailable as error:
        not_tested(f"a cluster of several hosts: {error}")


def test_a_run_on_four_hosts_outlives_the_loss_of_one_and_leaves_nothing_behind(
    machines, overrides, tmp_path
):
    head, learner, _, teacher, desk = machines  # commands are given at a desk that is no part of the cluster
    checkout = tmp_path / desk.name / CHECKOUT
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "data", "runs", "__pycache__"))
    adapt(checkout / FILE)
    output, unreachable = tmp_path / "output.txt", tmp_path / "unreachable.txt"
    at(desk, output, "ray", "get-auth-token", "--generate")
    at(desk, output, "python", "launch.py", "--check-cluster", FILE)
    at(desk, output, "ray", "up", "--yes", FILE)
    text = (checkout / FILE).read_text().replace("cluster_name: video-opd", "cluster_name: nobody")
    (checkout / "nobody.yaml").write_text(text.replace(f"head_ip: {head.address}", f"head_ip: {NETWORK}.99"))
    nobody = begin(
        desk, unreachable, "env", "AUTOSCALER_NODE_START_WAIT_S=5", "ray", "up", "--yes", "nobody.yaml"
    )
    options = [
        *(*SMALL, f"num_steps={STEPS}", "teacher_pool.num_replicas=2", "checkpoint_every=30"),
        *("request_timeout_s=30", "video.decode_timeout_s=20"),
        *("teacher_pool.health_check_s=2", "max_retries=5", f"runs_dir=/home/{USER}/runs", "run_name=hosts"),
    ]
    of_run = [option for option in overrides if not option.startswith("runs_dir=")]
    folder = tmp_path / head.name / "runs" / "hosts"
    launch = " ".join(["python", "video-opd/launch.py", *of_run, *options])
    run = begin(desk, output, "ray", "exec", FILE, launch)
    try:
        wait_for(lambda: last_step(folder) >= 2, run, "step 2")
        teacher.set_link(up=False)
        roles = [roles_on(host) for host in machines]
        wait_for(lambda: (folder / "summary.json").exists(), run, "the summary")
        assert run.wait(PATIENCE_S) == 0
    except BaseException:
        print(output.read_text()[-6000:])
        raise
    finally:
        if run.poll() is None:
            run.kill()
    assert roles == [set(), {"learner"}, {"rollout", "teacher"}, {"teacher"}, set()]
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics] == list(range(STEPS))
    replicas = [m["teacher/replicas"] for m in metrics]
    assert (replicas[0], replicas[-1]) == (2, 1), "the loss of the host was not noticed"
    assert Counter(r["step"] for r in trajectories_of(folder)) == dict.fromkeys(range(STEPS), GROUPS)
    assert json.loads((folder / "summary.json").read_text())["student_after"]["n"] == 4
    for step in (30, 60, STEPS):  # brought here from the learner's host, where nothing of it stays
        files = {p.name for p in (folder / "checkpoints" / f"step-{step}").rglob("*") if p.is_file()}
        assert {"manifest.json", "model.safetensors", "mp_rank_00_model_states.pt"} <= files
    left = tmp_path / learner.name / "runs"
    assert not [p for p in left.rglob("*") if p.is_file()]

    teacher.set_link(up=True)
    take_down(machines, output, tmp_path)
    assert nobody.wait(PATIENCE_S) == 1, "it ends by itself where ssh reaches nobody"
    assert (
        "SSH still not available" in unreachable.read_text()
        and "Failed to setup head node" in unreachable.read_text()
    )
