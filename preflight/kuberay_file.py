"""Checks KubeRay files: documents of kind RayCluster and RayJob. Ray itself reads the groups' resources."""

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from jsonschema import Draft7Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

HEAD = "headgroup"  # Ray's name for it


def _object(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _list_of(items: dict[str, Any], at_least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": at_least}


# JSON schemas of what is used here. The API server checks the file against KubeRay's own, which say more.
_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer"}
_NAMED = _list_of(_object(name=_TEXT))
_CONTAINER = _object("image", image=_TEXT, volumeMounts=_NAMED, resources=_object())
_POD = _object("containers", containers=_list_of(_CONTAINER, at_least=1), volumes=_NAMED)
_TEXTS = {"type": "object", "additionalProperties": {"type": "string", "remedy": "put it into quotes"}}
_HEAD = _object("template", rayStartParams=_TEXTS, template=_object("spec", spec=_POD))
_WORKERS = _object(
    *("template", "groupName", "minReplicas", "maxReplicas"),
    **_HEAD["properties"],
    **{"groupName": _TEXT, "replicas": _COUNT, "minReplicas": _COUNT, "maxReplicas": _COUNT},
)
_CLUSTER = _object(
    *("headGroupSpec", "rayVersion"),
    **{"rayVersion": _TEXT, "authOptions": _object(), "headGroupSpec": _HEAD},
    workerGroupSpecs=_list_of(_WORKERS),
)
_JOB = _object(
    "entrypoint", entrypoint=_TEXT, clusterSelector=_object("ray.io/cluster"), rayClusterSpec=_CLUSTER
)
SPECS = {"RayCluster": _CLUSTER, "RayJob": _JOB}


def check_kuberay(documents: Sequence[dict[str, Any]], roles: Sequence[str]) -> tuple[list[str], list[str]]:
    """(problems, one line for each group). Documents of other kinds are ignored."""
    documents = [d for d in documents if d.get("kind") in SPECS]
    if not documents:
        return ["no document is of kind RayCluster or RayJob: add one as in deploy/kuberay.yaml"], []
    if violations := [v for d in documents for v in schema_violations(d)]:
        return violations, []
    clusters = [d for d in documents if d["kind"] == "RayCluster"]
    jobs = [d for d in documents if d["kind"] == "RayJob"]
    names = [_name(c) for c in clusters]
    problems = [p for job in jobs for p in job_problems(job, names)]
    clusters += [
        {"metadata": {"name": f"{_name(job)}'s cluster"}, "spec": job["spec"]["rayClusterSpec"]}
        for job in jobs
        if "rayClusterSpec" in job["spec"]
    ]
    offers = []
    for cluster in clusters:
        found = list(cluster_problems(cluster)) or resource_problems(cluster, roles)
        problems += found
        offers += [] if found else describe_node_types(node_types(cluster), HEAD)
    return problems, offers


def describe_violation(violation: ValidationError) -> str:
    place = ".".join(str(part) for part in violation.absolute_path) or "top level"
    schema: Any = violation.schema
    return f"{place}: {violation.message}: {schema.get('remedy', 'correct it')}"


def schema_violations(document: dict[str, Any]) -> list[str]:
    kind = document["kind"]
    schema = _object(
        *("apiVersion", "metadata", "spec"),
        **{"apiVersion": {"const": "ray.io/v1"}, "metadata": _object(name=_TEXT), "spec": SPECS[kind]},
    )
    return [f"{kind}, {describe_violation(v)}" for v in Draft7Validator(schema).iter_errors(document)]


def _name(document: dict[str, Any]) -> str:
    return document["metadata"].get("name", "a document without a name")


def job_problems(job: dict[str, Any], clusters: Sequence[str]) -> Iterator[str]:
    name, spec = _name(job), job["spec"]
    if "clusterSelector" not in spec:
        if "rayClusterSpec" not in spec:
            yield f"{name}: no cluster to run on: add spec.clusterSelector or spec.rayClusterSpec"
        return
    selected = spec["clusterSelector"]["ray.io/cluster"]
    if clusters and selected not in clusters:
        yield f"{name}: no RayCluster {selected} is in this file: select {' or '.join(clusters)}"
    if spec.get("shutdownAfterJobFinishes"):
        yield f"{name}: KubeRay refuses shutdownAfterJobFinishes with clusterSelector: remove it"


def cluster_problems(cluster: dict[str, Any]) -> Iterator[str]:
    name, spec = _name(cluster), cluster["spec"]
    groups = spec.get("workerGroupSpecs", [])
    if spec.get("authOptions", {}).get("mode") != "token":
        yield f"{name}: anybody on the network may run code: set spec.authOptions.mode to token"
    growing = any(g["minReplicas"] != g["maxReplicas"] for g in groups)
    if growing and spec.get("enableInTreeAutoscaling") is not True:
        yield f"{name}: groups may grow, but nothing grows them: set spec.enableInTreeAutoscaling to true"
    for group_name, uses in Counter(g["groupName"] for g in groups).items():
        if uses > 1:
            yield f"{name}: groupName {group_name} is used more than once: rename one"
    for group in groups:
        place, low, high = f"{name}, group {group['groupName']}", group["minReplicas"], group["maxReplicas"]
        if low > high:
            yield f"{place}: minReplicas {low} is more than maxReplicas {high}: lower or raise one"
        elif not low <= group.get("replicas", low) <= high:
            yield f"{place}: replicas {group['replicas']} is not from {low} to {high}: correct it"
    for place, group in [("head", spec["headGroupSpec"]), *((f"group {g['groupName']}", g) for g in groups)]:
        pod = group["template"]["spec"]
        volumes = {v.get("name") for v in pod.get("volumes", [])}
        mounts = {m.get("name") for c in pod["containers"] for m in c.get("volumeMounts", [])}
        for volume in mounts - volumes:
            yield f"{name}, {place}: mounts the volume {volume}, which its volumes lack: add it there"


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


def node_types(cluster: dict[str, Any]) -> dict[str, Any]:
    """The groups as Ray's autoscaler reads them."""
    cluster = copy.deepcopy(cluster)
    cluster["metadata"].setdefault("namespace", "default")
    with quiet():
        return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def resource_problems(cluster: dict[str, Any], roles: Sequence[str]) -> list[str]:
    """Resources that Ray's autoscaler cannot read, and roles that no group offers."""
    name = _name(cluster)
    try:
        types = node_types(cluster)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ValidationError) as error:
        why = " ".join(str(error).split())
        return [
            f"{name}: Ray cannot read the resources of groups ({why}): write them as in deploy/kuberay.yaml"
        ]
    usable = [t["resources"] for group, t in types.items() if group == HEAD or t["max_workers"]]
    return [
        f"{name}: no group offers the resource {role}: add {role} to the resources in rayStartParams of one"
        for role in roles
        if not any(resources.get(role) for resources in usable)
    ]


def describe_node_types(types: dict[str, Any], head: str) -> list[str]:
    """One line for each node type: name, fewest-most nodes, resources."""
    lines = []
    for name, node_type in types.items():
        resources = ", ".join(f"{n} {r}" for r, n in node_type["resources"].items() if n and r != "memory")
        low, high = node_type["min_workers"], node_type["max_workers"]
        which = f"{name} (head):" if name == head else f"{name}: {low}-{high} nodes of"
        lines.append(f"{which} {resources or 'no resources'}")
    return lines
