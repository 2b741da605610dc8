"""Checks a cluster file before machines are rented: Ray's validation, and what Ray accepts but cannot use."""

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from video_opd.errors import ConfigError

ROLES = ("learner", "rollout", "teacher")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Fields of `provider` that Ray reads; it ignores others silently. A test compares them with Ray's code.
ANY_PROVIDER = {
    *("type", "use_internal_ips", "use_external_head_ip", "disable_node_updaters", "worker_liveness_check"),
    *("disable_launch_config_check", "foreground_node_launch"),
}
CLOUD = {"region", "availability_zone", "cache_stopped_nodes"}
PROVIDER_FIELDS = {
    "aws": CLOUD | {"aws_credentials", "key_pair", "security_group", "cloudwatch"},
    "gcp": CLOUD | {"project_id", "gcp_credentials"},
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}
NEEDED_FIELDS = {"aws": ["region"], "gcp": ["region", "availability_zone", "project_id"], "local": []}
OLD_KEYS = {"min_workers", "head_node", "worker_nodes"}  # Ray removes them before it validates
ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
DOCUMENTATION_ADDRESS = r"(?<![\w.])(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}(?![\w.])"
PLACEHOLDER = re.compile(rf"YOUR_[A-Z_]+|{DOCUMENTATION_ADDRESS}")
# What Ray's functions raise for a file that they cannot use.
OF_PYTHON = (ValueError, RuntimeError, AssertionError, KeyError, TypeError, AttributeError, ImportError)
REFUSALS = (*OF_PYTHON, click.ClickException, jsonschema.ValidationError)


def check_cluster(path: Path) -> int:
    """Prints what the file offers, or every problem with it. Returns 0, or 2 where it cannot work.

    Starts nothing and needs no credentials. Sources of file mounts are looked for where `ray up` would.
    Raises ConfigError if the file cannot be read."""
    text, documents = read_documents(path)
    kuberay = any("kind" in d for d in documents)
    problems, offers = check_kuberay(documents) if kuberay else check_ray_up(documents)
    for word, lines in placeholders(text).items():
        print(f"note: {path}: placeholder {word} in line {', '.join(lines)}: replace it", file=sys.stderr)
    for problem in problems:
        print(f"error: {path}: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("\n".join(offers))
    return 0


def read_documents(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The file's text and its YAML documents. Raises ConfigError."""
    try:
        text = path.read_text()
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({why}): name a cluster file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: correct it ({_one_line(error)})") from error
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise ConfigError(f"{path}: holds no mapping of keys to values: write it like cluster.yaml")
    return text, documents


def placeholders(text: str) -> dict[str, list[str]]:
    """Placeholder -> numbers of the lines that hold it, comments left out."""
    lines: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        for word in sorted(set(PLACEHOLDER.findall(re.sub(r"(^|\s)#.*", "", line)))):
            lines.setdefault(word, []).append(str(number))
    return lines


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what Ray's validation logs and prints, not what it raises."""
    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def check_ray_up(documents: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(problems, what the machines offer). Ray's own problems come first; the rest reads Ray's result."""
    if len(documents) > 1:
        return [f"{len(documents)} YAML documents: `ray up` reads one, split the file"], []
    if violations := schema_violations(documents[0]):
        return violations, []
    try:
        with quiet():
            config = prepare_config(documents[0])
            validate_config(config)
    except REFUSALS as error:
        return [f"Ray refuses it: {_one_line(error)}"], []
    local = config["provider"]["type"] == "local"
    checks = (access_problems, mount_problems, start_problems, host_problems if local else node_type_problems)
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        return problems, []
    return [], describe_hosts(config) if local else describe_node_types(config)


def schema_violations(config: dict[str, Any]) -> list[str]:
    """All violations of Ray's schema; Ray itself names only the first."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    current = {k: v for k, v in config.items() if k not in OLD_KEYS}
    violations = jsonschema.Draft7Validator(schema).iter_errors(current)
    places = ((".".join(map(str, v.absolute_path)) or "top level", v.message) for v in violations)
    return [f"{place}: {message}: correct it" for place, message in places]


def access_problems(config: dict[str, Any]) -> Iterator[str]:
    provider, auth = config["provider"], config["auth"]
    known = ANY_PROVIDER | PROVIDER_FIELDS.get(provider["type"], set(provider))
    for name in sorted(provider.keys() - known):
        yield f"provider.{name} is unknown: remove it, or use one of {', '.join(sorted(known))}"
    for name in NEEDED_FIELDS.get(provider["type"], []):
        if not provider.get(name):
            yield f"provider.{name} is missing: add it"
    if provider["type"] in NEEDED_FIELDS and not auth.get("ssh_user"):
        yield "auth.ssh_user is missing: name the user that ssh logs in as on the machines"
    for name in ("ssh_private_key", "ssh_public_key"):
        if auth.get(name) and not Path(auth[name]).expanduser().is_file():
            yield f"auth.{name} {auth[name]} is no file here: make it with ssh-keygen, or name another"


def mount_problems(config: dict[str, Any]) -> Iterator[str]:
    for target, source in config.get("file_mounts", {}).items():
        if not Path(str(source)).expanduser().exists():
            remedy = "correct the path, which is relative to the folder that `ray up` runs in"
            if str(target).endswith("/.ray/auth_token"):
                remedy = "make it with `ray get-auth-token --generate`"
            yield f"file_mounts: {source}, the source of {target}, does not exist here: {remedy}"


def start_commands(config: dict[str, Any], *nodes: str) -> str:
    """The commands that start Ray on "head" or "worker" nodes, one after the other."""
    commands = [c for n in nodes for c in config.get(f"{n}_start_ray_commands", [])]
    return "\n".join(c for c in commands if "ray start" in c)


def start_problems(config: dict[str, Any]) -> Iterator[str]:
    """Ray that starts without a token, has no way to get one, or shows its dashboard to everybody."""
    for node in ("head", "worker"):
        key, commands = f"{node}_start_ray_commands", start_commands(config, node)
        if not commands:
            yield f"{key} have no `ray start`: add it as in cluster.yaml"
        elif not re.search(r"\bRAY_AUTH_MODE=['\"]?token\b", commands):
            yield f"{key} do not set RAY_AUTH_MODE=token, so anybody may run code: export it there"
        for host in re.findall(r"--dashboard-host[= ]+['\"]?([^\s'\"]+)", commands):
            if host not in LOOPBACK:
                yield f"{key} bind the dashboard to {host}: use 127.0.0.1, and `ray dashboard` to look at it"
    mounted = any(str(target).endswith("/.ray/auth_token") for target in config.get("file_mounts", {}))
    if not mounted and "RAY_AUTH_TOKEN" not in start_commands(config, "head", "worker"):
        mount = "~/.ray/auth_token: ~/.ray/auth_token"
        yield f"no token reaches the nodes, Ray does not send it by itself: add `{mount}` to file_mounts"


def host_problems(config: dict[str, Any]) -> Iterator[str]:
    """Problems of one's own hosts, whose roles are in the commands that start Ray on them."""
    head, hosts = str(config["provider"].get("head_ip")), _worker_ips(config)
    for ip, times in Counter([head, *hosts]).items():
        if times > 1:
            yield f"provider names the host {ip} more than once: remove one"
    named = set(ADDRESS.findall(start_commands(config, "worker")))
    if named:  # roles by address
        for ip in sorted(set(hosts) - named):
            yield f"worker {ip} has no role in worker_start_ray_commands: add it there"
        for ip in sorted(named - {*hosts, head, *LOOPBACK}):
            yield f"worker_start_ray_commands name {ip}, which provider.worker_ips lack: add it there"
    for role in ROLES:
        if not re.search(rf"\b{role}\W+[1-9]", start_commands(config, "worker", "head")):
            yield f"no host offers the resource {role}: add --resources in worker_start_ray_commands"


def describe_hosts(config: dict[str, Any]) -> list[str]:
    """One line for each host: address and resources."""
    lines, commands = [f"{config['provider'].get('head_ip')} (head)"], start_commands(config, "worker")
    for ip in _worker_ips(config):
        role = re.search(rf"{re.escape(ip)}(?![\d.]).*?(\{{.*?\}})", commands)
        lines.append(f"{ip}: {role[1] if role else 'resources as in worker_start_ray_commands'}")
    return lines


def _worker_ips(config: dict[str, Any]) -> list[str]:
    return [str(ip) for ip in config["provider"].get("worker_ips") or []]


def node_type_problems(config: dict[str, Any]) -> Iterator[str]:
    types = config["available_node_types"]
    for name, t in types.items():
        low, high = t["min_workers"], t["max_workers"]
        if low > high:
            yield f"node type {name}: its minimum of {low} is more than its maximum of {high}: change one"
    usable = [t for name, t in types.items() if name == config["head_node_type"] or t["max_workers"] > 0]
    for role in ROLES:
        if not any(t.get("resources", {}).get(role) for t in usable):
            yield f"no node type offers the resource {role}: add it to one that may have workers"


def describe_node_types(config: dict[str, Any]) -> list[str]:
    """One line for each node type: name, fewest-most nodes, resources."""
    lines = []
    for name, t in config["available_node_types"].items():
        resources = ", ".join(f"{n} {r}" for r, n in t["resources"].items() if n and r != "memory")
        is_head = name == config["head_node_type"]
        which = f"{name} (head):" if is_head else f"{name}: {t['min_workers']}-{t['max_workers']} nodes of"
        lines.append(f"{which} {resources or 'no resources'}")
    return lines


def check_kuberay(documents: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(problems, what the groups offer) of documents of kind RayCluster and RayJob; others are ignored.

    The API server and KubeRay's operator check fields and types themselves, before any pod starts."""
    clusters = [d for d in documents if d.get("kind") == "RayCluster"]
    jobs = [d for d in documents if d.get("kind") == "RayJob"]
    if not clusters and not jobs:
        return ["no document is of kind RayCluster or RayJob: add one as in deploy/kuberay.yaml"], []
    problems: list[str] = []
    offers: list[str] = []
    try:
        names = [c["metadata"]["name"] for c in clusters]
        for job in jobs:
            problems += job_problems(job, names)
            if own := job["spec"].get("rayClusterSpec"):
                clusters.append({"metadata": {"name": f"{job['metadata']['name']}'s"}, "spec": own})
        for cluster in clusters:
            metadata = {"namespace": "default", **cluster["metadata"]}
            with quiet():  # as Ray's autoscaler reads it
                config = _derive_autoscaling_config_from_ray_cr(cluster | {"metadata": metadata})
            found = list(group_problems(cluster["spec"])) or list(node_type_problems(config))
            problems += [f"{metadata['name']}: {problem}" for problem in found]
            offers += describe_node_types(config)
    except REFUSALS as error:
        why = f"{type(error).__name__}: {_one_line(error)}"
        problems.append(f"Ray cannot read it ({why}): write it as in deploy/kuberay.yaml")
    return problems, offers


def job_problems(job: dict[str, Any], clusters: list[str]) -> Iterator[str]:
    name, spec = job["metadata"]["name"], job["spec"]
    if not spec.get("entrypoint"):
        yield f"{name}: spec.entrypoint is missing: add the command of the run"
    selected = spec.get("clusterSelector", {}).get("ray.io/cluster")
    if selected and clusters and selected not in clusters:
        yield f"{name}: no RayCluster {selected} is in this file: select {' or '.join(clusters)}"


def group_problems(spec: dict[str, Any]) -> Iterator[str]:
    groups = spec.get("workerGroupSpecs", [])
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "anybody on the network may run code: set spec.authOptions.mode to token"
    growing = any(g["minReplicas"] != g["maxReplicas"] for g in groups)
    if growing and spec.get("enableInTreeAutoscaling") is not True:
        yield "groups may grow, but nothing grows them: set spec.enableInTreeAutoscaling to true"
    for name, uses in Counter(g["groupName"] for g in groups).items():
        if uses > 1:
            yield f"groupName {name} is used more than once: rename one"
    for group in [spec["headGroupSpec"], *groups]:
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        for container in pod["containers"]:
            if not container.get("image"):
                yield f"group {name}: a container has no image: name the one of deploy/Dockerfile"
        mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
        for volume in sorted(mounts - {v["name"] for v in pod.get("volumes", [])}):
            yield f"group {name}: mounts the volume {volume}, which its volumes lack: add it there"
