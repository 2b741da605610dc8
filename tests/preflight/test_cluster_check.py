"""What --check-cluster finds."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import launch
from preflight.cluster_file import ANY_PROVIDER, PROVIDER_FIELDS
from tests.preflight.cluster_files import AWS, GCP, KUBERAY, LOCAL, load


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


GROUPS = (0, "spec", "workerGroupSpecs")
BAD: list[tuple[str, Callable[[Any], None], str]] = [
    (
        AWS,
        put(2, "available_node_types", "learner", "min_workers"),
        "node type learner: its minimum of 2 is more than its maximum of 1: change one",
    ),
    (
        AWS,
        put(3, "max_workers"),
        "Ray refuses it: The specified global `max_workers` is smaller than the sum of `min_workers` of all "
        "the available node types.",
    ),
    (
        AWS,
        put("gone", "file_mounts", "/data"),
        "file_mounts: gone, the source of /data, does not exist here: correct the path, which is relative "
        "to the folder that `ray up` runs in",
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
        "no token reaches the nodes, Ray does not send it by itself: add "
        "`~/.ray/auth_token: ~/.ray/auth_token` to file_mounts",
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
        "no node type offers the resource teacher: add it to one that may have workers",
    ),
    (
        GCP,
        lambda c: c["available_node_types"]["rollout"].update(min_workers=0, max_workers=0),
        "no node type offers the resource rollout: add it to one that may have workers",
    ),
    (
        AWS,
        swap("=127.0.0.1", "=0.0.0.0", "head_start_ray_commands", 1),
        "head_start_ray_commands bind the dashboard to 0.0.0.0: use 127.0.0.1, "
        "and `ray dashboard` to look at it",
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
        "provider names the host 192.0.2.12 more than once: remove one",
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
        "Ray refuses it: The specified global `max_workers` is smaller than the sum of `min_workers` of all "
        "the available node types.",
    ),
    (
        AWS,
        put("ec2", "provider", "type"),
        "Ray refuses it: Unsupported node provider: ec2",
    ),
    (
        AWS,
        put(1, "worker_ips"),
        "top level: Additional properties are not allowed ('worker_ips' was unexpected): correct it",
    ),
    (AWS, put("many", "max_workers"), "max_workers: 'many' is not of type 'integer': correct it"),
    (AWS, pop("cluster_name"), "top level: 'cluster_name' is a required property: correct it"),
    (AWS, pop("docker", "container_name"), "Ray refuses it: Must provide a container & image name"),
    (KUBERAY, pop(1, "spec"), "Ray cannot read it (KeyError: 'spec'): write it as in deploy/kuberay.yaml"),
    (
        KUBERAY,
        put("teacher: 1", *GROUPS, 2, "rayStartParams", "resources"),
        "Ray cannot read it (JSONDecodeError: Expecting value: line 1 column 1 (char 0)): "
        "write it as in deploy/kuberay.yaml",
    ),
    (
        KUBERAY,
        put(2, *GROUPS, 0, "minReplicas"),
        "video-opd: node type learner: its minimum of 2 is more than its maximum of 1: change one",
    ),
    (
        KUBERAY,
        put("learner", *GROUPS, 1, "groupName"),
        "video-opd: groupName learner is used more than once: rename one",
    ),
    (
        KUBERAY,
        pop(*GROUPS, 2, "rayStartParams", "resources"),
        "video-opd: no node type offers the resource teacher: add it to one that may have workers",
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
        "video-opd: group rollout: mounts the volume shm, which its volumes lack: add it there",
    ),
    (
        KUBERAY,
        pop(1, "spec", "entrypoint"),
        "video-opd-run: spec.entrypoint is missing: add the command of the run",
    ),
    (
        KUBERAY,
        pop(*GROUPS, 1, "template", "spec", "containers", 0, "image"),
        "video-opd: group rollout: a container has no image: name the one of deploy/Dockerfile",
    ),
    (
        KUBERAY,
        put("other", 1, "spec", "clusterSelector", "ray.io/cluster"),
        "video-opd-run: no RayCluster other is in this file: select video-opd",
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
    config |= {"auth": {}, "provider": {"type": "aws", "zone": "a"}}
    config["available_node_types"]["learner"]["min_workers"] = 5
    code, _, err = check(config)
    errors = [e for e in err if e.startswith("error: ")]
    assert code == 2 and len(errors) == 4
    words = ("provider.zone is unknown", "provider.region", "minimum of 5", "ssh_user")
    assert all(any(word in e for e in errors) for word in words)
    code, _, err = check(config | {"surplus": 1, "max_workers": "many"})  # Ray's schema comes first
    errors = [e for e in err if e.startswith("error: ")]
    assert code == 2 and len(errors) == 2 and "surplus" in errors[0] and "max_workers" in errors[1]


def test_a_placeholder_is_named_with_its_lines(check):
    text = '# YOUR_NAME\na: YOUR_AMI\nb: [x, "YOUR_AMI"]\nc: |\n  one\n  192.0.2.7\n'
    assert [line for line in check(text)[2] if line.startswith("note: ")] == [
        "note: placeholder YOUR_AMI in line 2, 3: replace it",
        "note: placeholder 192.0.2.7 in line 6: replace it",
    ]


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
