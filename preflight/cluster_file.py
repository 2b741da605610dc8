"""What is wrong with a file of machines before any is rented: Ray's own validation, and what Ray lets pass but cannot work."""

import copy
import ipaddress
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.providers import _NODE_PROVIDERS, _get_default_config
from ray.autoscaler._private.util import prepare_config, validate_config

from preflight.kuberay_file import check_kuberay, quiet

ROLES = ("learner", "rollout", "teacher")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_MOUNT = "~/.ray/auth_token: ~/.ray/auth_token"
ANY_PROVIDER = {
    "type",
    "use_internal_ips",
    "use_external_head_ip",
    "disable_node_updaters",
    "disable_launch_config_check",
    "foreground_node_launch",
    "worker_liveness_check",
}
# What Ray's code reads of the section `provider`; tests/test_cluster_files.py compares it with that code.
PROVIDER_FIELDS = {
    "aws": {
        "region",
        "availability_zone",
        "aws_credentials",
        "key_pair",
        "security_group",
        "cache_stopped_nodes",
        "cloudwatch",
    },
    "gcp": {"region", "availability_zone", "project_id", "gcp_credentials", "cache_stopped_nodes"},
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}
NEEDED_FIELDS = {
    "aws": ["region"],
    "gcp": ["region", "availability_zone", "project_id"],
    "local": ["head_ip", "worker_ips"],
}
OLD_KEYS = ("min_workers", "head_node", "worker_nodes")  # Ray takes them out before it validates
DOCUMENTATION_NETWORKS = [
    ipaddress.ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
]
ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
PLACEHOLDER = re.compile(r"YOUR_[A-Z_]+")


@dataclass(frozen=True)
class Findings:
    """`problems` cannot work; `notes` are to be filled in; `node_types` says what the file offers."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    node_types: list[str] = field(default_factory=list)


def check_cluster(path: Path) -> int:
    """Prints what is wrong with the file, all of it, or what it offers. Returns the exit code: 0, or 2 where it cannot work."""
    findings = inspect_file(path)
    for note in findings.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    for problem in findings.problems:
        print(f"error: {path}: {problem}", file=sys.stderr)
    if findings.problems:
        return 2
    print("\n".join(findings.node_types))
    return 0


def inspect_file(path: Path) -> Findings:
    """Reads and checks; starts nothing, needs no credentials. Sources of file mounts are looked for where `ray up` would."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        return Findings(
            [f"cannot be read ({getattr(error, 'strerror', None) or error}): name a cluster file"]
        )
    except (yaml.YAMLError, ValueError) as error:
        return Findings([f"not YAML: mend it ({' '.join(str(error).split())})"])
    if not documents or not all(isinstance(d, dict) for d in documents):
        return Findings(["holds no mapping of keys to values: write it as cluster.yaml is"])
    notes = placeholders(documents)
    if any("kind" in d for d in documents):
        problems, node_types = check_kuberay(documents, ROLES)
        return Findings(problems, notes, node_types)
    if len(documents) > 1:
        return Findings([f"{len(documents)} YAML documents: `ray up` reads one, split the file"])
    (config,) = documents
    violations = schema_violations(config)
    problems = [describe_violation(v) for v in violations]
    if not any(v.validator == "type" for v in violations):
        problems += own_problems(config)
    return Findings(problems or ray_problems(config), notes, [] if problems else describe_node_types(config))


def placeholders(tree: Any) -> list[str]:
    """One line for each kind of value that a user has to replace, with the places where it stands."""
    found: dict[str, list[str]] = {}
    for place, text in _texts(tree):
        words = [*PLACEHOLDER.findall(text), *(a for a in ADDRESS.findall(text) if _is_for_documentation(a))]
        for word in dict.fromkeys(words):
            found.setdefault(word, []).append(place)
    return [
        f"placeholder {word} in {', '.join(dict.fromkeys(places))}: replace it"
        for word, places in found.items()
    ]


def _texts(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, place)


def _is_for_documentation(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in DOCUMENTATION_NETWORKS)


def schema_violations(config: dict[str, Any]) -> list[jsonschema.ValidationError]:
    """All that the file has against the schema that Ray ships, where Ray itself names the first."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return list(
        jsonschema.Draft7Validator(schema).iter_errors({k: v for k, v in config.items() if k not in OLD_KEYS})
    )


def describe_violation(violation: jsonschema.ValidationError) -> str:
    place = ".".join(str(part) for part in violation.absolute_path) or "top level"
    return f"{place}: {violation.message}: correct it"


def own_problems(config: dict[str, Any]) -> list[str]:
    """What Ray lets pass, or stumbles over at its first command."""
    provider = config.get("provider", {})
    kind = provider.get("type")
    if kind is None:
        return []  # said by the schema
    if kind not in _NODE_PROVIDERS:
        return [f"provider.type {kind} is unknown to Ray: take one of {', '.join(sorted(_NODE_PROVIDERS))}"]
    problems = [
        *provider_problems(provider),
        *access_problems(config),
        *mount_problems(config),
        *start_problems(config),
    ]
    return problems + (local_problems(config) if kind == "local" else node_type_problems(config))


def provider_problems(provider: dict[str, Any]) -> list[str]:
    kind = provider["type"]
    if kind not in PROVIDER_FIELDS:
        return []
    known = PROVIDER_FIELDS[kind] | ANY_PROVIDER
    problems = [
        f"provider.{name} is no field of provider {kind}: take it out, or correct it to one of {', '.join(sorted(known))}"
        for name in sorted(provider.keys() - known)
    ]
    needed = ["coordinator_address"] if provider.get("coordinator_address") else NEEDED_FIELDS[kind]
    return problems + [f"provider.{name} is missing: name it" for name in needed if not provider.get(name)]


def access_problems(config: dict[str, Any]) -> list[str]:
    auth, problems = config.get("auth", {}), []
    if config["provider"]["type"] in PROVIDER_FIELDS and not auth.get("ssh_user"):
        problems.append("auth.ssh_user is missing: name the user that ssh logs in as on the machines")
    for name in ("ssh_private_key", "ssh_public_key"):
        if auth.get(name) and not Path(auth[name]).expanduser().is_file():
            problems.append(
                f"auth.{name} {auth[name]} is no file here: make it with ssh-keygen, or name another"
            )
    return problems


def mount_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    for target, source in config.get("file_mounts", {}).items():
        if Path(str(source)).expanduser().exists():
            continue
        remedy = "mend the path; it is relative to the folder that `ray up` is run in"
        if str(target).endswith("/.ray/auth_token"):
            remedy = "make it with `ray get-auth-token --generate`"
        problems.append(f"file_mounts: {source}, the source of {target}, does not exist here: {remedy}")
    return problems


def start_commands(config: dict[str, Any], node: str) -> list[str]:
    """Those that start Ray on the head or on workers; Ray's own where the file names none."""
    key = f"{node}_start_ray_commands"
    return [c for c in config.get(key, _defaults(config).get(key, [])) if "ray start" in c]


def start_problems(config: dict[str, Any]) -> list[str]:
    """Ray that starts without a token, with none to be had, or with a dashboard for everybody."""
    problems = []
    for node in ("head", "worker"):
        commands = start_commands(config, node)
        if not commands:
            problems.append(f"{node}_start_ray_commands have no `ray start`: add it as in cluster.yaml")
        elif not all(re.search(r"\bRAY_AUTH_MODE=['\"]?token\b", c) for c in commands):
            problems.append(
                f"{node}_start_ray_commands do not set RAY_AUTH_MODE=token, so anybody may run code: export it there"
            )
    for command in start_commands(config, "head"):
        for host in re.findall(r"--dashboard-host[= ]+(\S+)", command):
            if host.strip("'\"") not in LOOPBACK:
                problems.append(
                    f"head_start_ray_commands bind the dashboard to {host}: use 127.0.0.1, and `ray dashboard` to look at it"
                )
    shipped = any(str(target).endswith("/.ray/auth_token") for target in config.get("file_mounts", {}))
    elsewhere = any(
        "RAY_AUTH_TOKEN" in c for node in ("head", "worker") for c in start_commands(config, node)
    )
    if not shipped and not elsewhere:
        problems.append(
            f"no token reaches the nodes, Ray does not send it by itself: add `{TOKEN_MOUNT}` to file_mounts"
        )
    return problems


def node_type_problems(config: dict[str, Any]) -> list[str]:
    """Of the providers that rent machines by type."""
    types, head = config.get("available_node_types", {}), config.get("head_node_type")
    if not types:
        return [
            "available_node_types is missing: write one type for each of head, learner, rollout and teacher"
        ]
    problems = []
    if head not in types:
        problems.append(
            f"head_node_type {head} is none of available_node_types ({', '.join(types)}): name one of them"
        )
    most = config.get("max_workers", _defaults(config).get("max_workers"))
    fewest = 0
    for name in types:
        low, high = bounds(config, name)
        fewest += low
        if low > high:
            problems.append(
                f"available_node_types.{name}: min_workers {low} is more than max_workers {high}: lower or raise one"
            )
    if most is not None and fewest > most:
        problems.append(
            f"min_workers of all types add up to {fewest}, max_workers is {most}: raise max_workers"
        )
    for role in ROLES:
        offering = [
            name for name, node_type in types.items() if node_type.get("resources", {}).get(role, 0) >= 1
        ]
        if not any(name == head or bounds(config, name)[1] > 0 for name in offering):
            problems.append(
                f"no node type offers the resource {role}: add `{role}: 1` to one that may have workers"
            )
    return problems


def bounds(config: dict[str, Any], name: str) -> tuple[int, int]:
    """(min_workers, max_workers) of a type, as Ray fills them in."""
    node_type = config["available_node_types"][name]
    most = config.get("max_workers", _defaults(config).get("max_workers", 0))
    default = 0 if name == config.get("head_node_type") else most
    return node_type.get("min_workers", 0), node_type.get("max_workers", default)


def local_problems(config: dict[str, Any]) -> list[str]:
    """Of one's own machines, whose roles are in the commands that start Ray on them."""
    provider, problems = config["provider"], []
    for name in ("available_node_types", "head_node_type"):
        if config.get(name):
            problems.append(
                f"{name} cannot be used with provider local: say each host's resources in worker_start_ray_commands"
            )
    hosts = [str(ip) for ip in provider.get("worker_ips") or []]
    problems += [
        f"provider.worker_ips names {ip} twice: take one out"
        for ip in sorted({h for h in hosts if hosts.count(h) > 1})
    ]
    if str(provider.get("head_ip")) in hosts:
        problems.append(f"provider.head_ip {provider['head_ip']} is one of worker_ips too: take it out there")
    most = config.get("max_workers", len(hosts))
    if config.get("min_workers", 0) > most:
        problems.append(
            f"min_workers {config['min_workers']} is more than max_workers {most}: lower or raise one"
        )
    commands = "\n".join(start_commands(config, "worker"))
    mentioned = set(ADDRESS.findall(commands))
    if mentioned:  # roles by address
        problems += [
            f"worker {ip} has no role in worker_start_ray_commands: add it there"
            for ip in hosts
            if ip not in mentioned
        ]
        strangers = sorted(mentioned - {*hosts, str(provider.get("head_ip")), *LOOPBACK})
        problems += [
            f"worker_start_ray_commands name {ip}, which is none of provider.worker_ips: add it there"
            for ip in strangers
        ]
    everywhere = commands + "\n".join(start_commands(config, "head"))
    for role in ROLES:
        if not re.search(rf"\b{role}\W+[1-9]", everywhere):
            problems.append(
                f"no host offers the resource {role}: give it to one with --resources in worker_start_ray_commands"
            )
    return problems


def ray_problems(config: dict[str, Any]) -> list[str]:
    """What Ray's own validation says."""
    try:
        with quiet():
            validate_config(prepare_config(copy.deepcopy(config)))
    except (
        ValueError,
        RuntimeError,
        AssertionError,
        KeyError,
        click.ClickException,
        jsonschema.ValidationError,
    ) as error:
        return [f"Ray refuses it: {' '.join(str(error).split())}"]
    return []


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return _get_default_config(config["provider"])
    except (NotImplementedError, ImportError):
        return {}


def describe_node_types(config: dict[str, Any]) -> list[str]:
    """One line a node type, or one a host: name, fewest-most, resources."""
    if config["provider"]["type"] != "local":
        types = config["available_node_types"]
        return [
            describe(name, *bounds(config, name), t["resources"], config["head_node_type"])
            for name, t in types.items()
        ]
    commands = "\n".join(start_commands(config, "worker"))
    lines = [f"{config['provider'].get('head_ip')} (head)"]
    for ip in config["provider"].get("worker_ips") or []:
        role = re.search(rf"{re.escape(str(ip))}(?![\d.]).*?(\{{.*?\}})", commands)
        lines.append(f"{ip}: {role[1] if role else 'resources as worker_start_ray_commands say'}")
    return lines


def describe(name: str, low: int, high: int, resources: dict[str, Any], head: str) -> str:
    offered = (
        ", ".join(f"{amount} {resource}" for resource, amount in resources.items() if amount)
        or "no resources"
    )
    return f"{name} (head): {offered}" if name == head else f"{name}: {low}-{high} nodes of {offered}"
