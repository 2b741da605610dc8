"""Checks a cluster file before machines are rented: Ray's validation, and what Ray accepts but cannot use."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.providers import _NODE_PROVIDERS
from ray.autoscaler._private.util import (
    fill_node_type_min_max_workers,
    fillout_defaults,
    prepare_config,
    validate_config,
)

from preflight.kuberay_file import check_kuberay, describe_node_types, describe_violation, quiet
from video_opd.errors import ConfigError

ROLES = ("learner", "rollout", "teacher")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Fields of `provider` that Ray reads; tests/preflight/test_cluster_files.py compares them with Ray's code.
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
OLD_KEYS = ("min_workers", "head_node", "worker_nodes")  # Ray removes them before it validates
ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
PLACEHOLDER = re.compile(  # or an address that is reserved for documentation
    r"YOUR_[A-Z_]+|(?<![\w.])(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}(?![\w.])"
)
# What Ray's functions raise for a file that they cannot use.
REFUSALS = (
    *(ValueError, RuntimeError, AssertionError, KeyError, TypeError, AttributeError, ImportError),
    *(click.ClickException, jsonschema.ValidationError),
)


def check_cluster(path: Path) -> int:
    """Prints what the file offers, or every problem with it. Returns 0, or 2 where it cannot work.

    Starts nothing and needs no credentials. Sources of file mounts are looked for where `ray up` would.
    Raises ConfigError if the file cannot be read.
    """
    documents = read_documents(path)
    kuberay = any("kind" in d for d in documents)
    problems, offers = check_kuberay(documents, ROLES) if kuberay else check_ray_up(documents)
    for note in placeholders(documents):
        print(f"note: {path}: {note}", file=sys.stderr)
    for problem in problems:
        print(f"error: {path}: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("\n".join(offers))
    return 0


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The file's YAML documents. Raises ConfigError."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({why}): name a cluster file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: correct it ({' '.join(str(error).split())})") from error
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise ConfigError(f"{path}: holds no mapping of keys to values: write it like cluster.yaml")
    return documents


def placeholders(documents: list[dict[str, Any]]) -> list[str]:
    """One line for each placeholder, with all places where it stands."""
    places: dict[str, list[str]] = {}
    for place, text in _texts(documents, ""):
        for word in PLACEHOLDER.findall(text):
            places.setdefault(word, []).append(place)
    return [
        f"placeholder {word} in {', '.join(dict.fromkeys(at))}: replace it" for word, at in places.items()
    ]


def _texts(tree: Any, place: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every text; items of a list have the list's place."""
    if isinstance(tree, str):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, place)


def check_ray_up(documents: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(problems, what the machines offer) of a file for `ray up`."""
    if len(documents) > 1:
        return [f"{len(documents)} YAML documents: `ray up` reads one, split the file"], []
    (config,) = documents
    violations = schema_violations(config)
    problems = [describe_violation(v) for v in violations]
    if any(v.validator == "type" for v in violations) or "type" not in config.get("provider", {}):
        return problems, []
    kind = config["provider"]["type"]
    if kind not in _NODE_PROVIDERS:
        known = ", ".join(sorted(_NODE_PROVIDERS))
        return [*problems, f"provider.type {kind} is unknown to Ray: use one of {known}"], []
    if kind != "local" and not config.get("available_node_types"):
        return [*problems, f"available_node_types is missing: add types for head, {', '.join(ROLES)}"], []
    try:
        with quiet():
            filled = fillout_defaults(config)
            if kind != "local":
                fill_node_type_min_max_workers(filled)
    except REFUSALS as error:
        return [*problems, _refusal(error)], []
    for check in (provider_problems, access_problems, mount_problems, start_problems):
        problems += check(filled)
    problems += local_problems(filled) if kind == "local" else node_type_problems(filled)
    if not violations:
        problems += ray_problems(config)
    if problems:
        return problems, []
    if kind == "local":
        return [], describe_hosts(filled)
    return [], describe_node_types(filled["available_node_types"], filled["head_node_type"])


def schema_violations(config: dict[str, Any]) -> list[jsonschema.ValidationError]:
    """All violations of Ray's schema; Ray itself names only the first."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    current = {k: v for k, v in config.items() if k not in OLD_KEYS}
    return list(jsonschema.Draft7Validator(schema).iter_errors(current))


def ray_problems(config: dict[str, Any]) -> list[str]:
    """What Ray's own validation refuses."""
    try:
        with quiet():
            validate_config(prepare_config(config))
    except REFUSALS as error:
        return [_refusal(error)]
    return []


def _refusal(error: BaseException) -> str:
    return f"Ray refuses it: {' '.join(str(error).split())}"


def provider_problems(config: dict[str, Any]) -> Iterator[str]:
    provider, kind = config["provider"], config["provider"]["type"]
    if kind not in PROVIDER_FIELDS:
        return
    known = PROVIDER_FIELDS[kind] | ANY_PROVIDER
    remedy = f"remove it, or use one of {', '.join(sorted(known))}"
    for name in sorted(provider.keys() - known):
        yield f"provider.{name} is no field of provider {kind}: {remedy}"
    for name in NEEDED_FIELDS[kind]:
        if not provider.get(name):
            yield f"provider.{name} is missing: add it"


def access_problems(config: dict[str, Any]) -> Iterator[str]:
    auth = config["auth"]
    if config["provider"]["type"] in PROVIDER_FIELDS and not auth.get("ssh_user"):
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


def start_commands(config: dict[str, Any], *nodes: str) -> list[str]:
    """The commands that start Ray on "head" or "worker" nodes."""
    return [c for n in nodes for c in config.get(f"{n}_start_ray_commands", []) if "ray start" in c]


def start_problems(config: dict[str, Any]) -> Iterator[str]:
    """Ray that starts without a token, has no way to get one, or shows its dashboard to everybody."""
    for node in ("head", "worker"):
        key, commands = f"{node}_start_ray_commands", start_commands(config, node)
        if not commands:
            yield f"{key} have no `ray start`: add it as in cluster.yaml"
        elif not all(re.search(r"\bRAY_AUTH_MODE=['\"]?token\b", c) for c in commands):
            yield f"{key} do not set RAY_AUTH_MODE=token, so anybody may run code: export it there"
        for host in re.findall(r"--dashboard-host[= ]+['\"]?([^\s'\"]+)", "\n".join(commands)):
            if host not in LOOPBACK:
                yield f"{key} bind the dashboard to {host}: use 127.0.0.1, and `ray dashboard` to look at it"
    mounted = any(str(target).endswith("/.ray/auth_token") for target in config.get("file_mounts", {}))
    if not mounted and not any("RAY_AUTH_TOKEN" in c for c in start_commands(config, "head", "worker")):
        mount = "~/.ray/auth_token: ~/.ray/auth_token"
        yield f"no token reaches the nodes, Ray does not send it by itself: add `{mount}` to file_mounts"


def node_type_problems(config: dict[str, Any]) -> Iterator[str]:
    """Problems of providers that rent machines by type."""
    types = config["available_node_types"]
    for name, t in types.items():
        low, high = t["min_workers"], t["max_workers"]
        if low > high:
            place = f"available_node_types.{name}"
            yield f"{place}: min_workers {low} is more than max_workers {high}: lower or raise one"
    usable = [t for name, t in types.items() if name == config["head_node_type"] or t["max_workers"] > 0]
    for role in ROLES:
        if not any(t.get("resources", {}).get(role) for t in usable):
            yield f"no node type offers the resource {role}: add `{role}: 1` to one that may have workers"


def local_problems(config: dict[str, Any]) -> Iterator[str]:
    """Problems of one's own hosts, whose roles are in the commands that start Ray on them."""
    head = str(config["provider"].get("head_ip"))
    hosts = [str(ip) for ip in config["provider"].get("worker_ips") or []]
    for ip, times in Counter(hosts).items():
        if times > 1:
            yield f"provider.worker_ips names {ip} more than once: remove one"
    if head in hosts:
        yield f"provider.head_ip {head} is also in provider.worker_ips: remove it there"
    named = set(ADDRESS.findall("\n".join(start_commands(config, "worker"))))
    if named:  # roles by address
        for ip in sorted(set(hosts) - named):
            yield f"worker {ip} has no role in worker_start_ray_commands: add it there"
        for ip in sorted(named - {*hosts, head, *LOOPBACK}):
            yield f"worker_start_ray_commands name {ip}, which provider.worker_ips lack: add it there"
    commands = "\n".join(start_commands(config, "worker", "head"))
    for role in ROLES:
        if not re.search(rf"\b{role}\W+[1-9]", commands):
            yield f"no host offers the resource {role}: add --resources in worker_start_ray_commands"


def describe_hosts(config: dict[str, Any]) -> list[str]:
    """One line for each host: address and resources."""
    commands = "\n".join(start_commands(config, "worker"))
    lines = [f"{config['provider'].get('head_ip')} (head)"]
    for ip in config["provider"].get("worker_ips") or []:
        role = re.search(rf"{re.escape(str(ip))}(?![\d.]).*?(\{{.*?\}})", commands)
        lines.append(f"{ip}: {role[1] if role else 'resources as in worker_start_ray_commands'}")
    return lines
