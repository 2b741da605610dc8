"""The same for KubeRay: documents of kind RayCluster and RayJob. What Ray's autoscaler makes of them is asked of Ray itself."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from jsonschema import Draft7Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

HEAD = "headgroup"  # Ray's name for it


def _mapping(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_NAMED = _list_of(_mapping(name={"type": "string"}))
_POD = _mapping(
    containers=_list_of(
        _mapping(image={"type": "string"}, volumeMounts=_NAMED, resources={"type": "object"})
    ),
    volumes=_NAMED,
)
_GROUP = _mapping(
    rayStartParams={"type": "object"}, template=_mapping(spec=_POD), replicas={"type": "integer"}
)
_CLUSTER = _mapping(authOptions={"type": "object"}, headGroupSpec=_GROUP, workerGroupSpecs=_list_of(_GROUP))
_JOB = _mapping(clusterSelector={"type": "object"}, rayClusterSpec=_CLUSTER, entrypoint={"type": "string"})
# The forms of what is looked at below; KubeRay's own schema says more, and the API server holds the file to it.
FORMS = {"RayCluster": _CLUSTER, "RayJob": _JOB}


def check_kuberay(documents: Sequence[dict[str, Any]], roles: Sequence[str]) -> tuple[list[str], list[str]]:
    """(problems, one line a group). Documents of other kinds are left alone."""
    clusters = [d for d in documents if d.get("kind") == "RayCluster"]
    jobs = [d for d in documents if d.get("kind") == "RayJob"]
    malformed = [p for d in [*clusters, *jobs] for p in form_problems(d)]
    if malformed:
        return malformed, []
    names = [_name(c) for c in clusters]
    problems = (
        []
        if clusters or jobs
        else ["no document is of kind RayCluster or RayJob: add one as in deploy/kuberay.yaml"]
    )
    lines = []
    for document in [*clusters, *jobs]:
        if document.get("apiVersion") != "ray.io/v1":
            problems.append(
                f"{_name(document)}: apiVersion {document.get('apiVersion')} is not ray.io/v1: correct it"
            )
    for job in jobs:
        problems += job_problems(job, names)
        own = job["spec"].get("rayClusterSpec")
        if own:
            clusters.append({"metadata": {"name": f"{_name(job)}'s cluster"}, "spec": own})
    for cluster in clusters:
        found = cluster_problems(cluster, roles)
        problems += found
        if not found:
            lines += describe_groups(cluster)
    return problems, lines


def form_problems(document: dict[str, Any]) -> list[str]:
    form = _mapping(metadata=_mapping(name={"type": "string"}), spec=FORMS[document["kind"]]) | {
        "required": ["metadata", "spec"]
    }
    return [
        f"{document['kind']}, {'.'.join(str(part) for part in error.absolute_path) or 'top level'}: {error.message}: correct it"
        for error in Draft7Validator(form).iter_errors(document)
    ]


def _name(document: dict[str, Any]) -> str:
    return document["metadata"].get("name", "a document without a name")


def job_problems(job: dict[str, Any], clusters: Sequence[str]) -> list[str]:
    name, spec, problems = _name(job), job["spec"], []
    if not spec.get("entrypoint"):
        problems.append(f"{name}: spec.entrypoint is missing: write the command that runs launch.py")
    selector = spec.get("clusterSelector")
    if not selector and not spec.get("rayClusterSpec"):
        problems.append(
            f"{name}: neither spec.clusterSelector nor spec.rayClusterSpec: say on which cluster it runs"
        )
    if selector and "ray.io/cluster" not in selector:
        problems.append(
            f"{name}: spec.clusterSelector has no label ray.io/cluster: name the RayCluster with it"
        )
    elif selector and clusters and selector["ray.io/cluster"] not in clusters:
        problems.append(
            f"{name}: no RayCluster {selector['ray.io/cluster']} is in this file: select {' or '.join(clusters)}"
        )
    if selector and spec.get("shutdownAfterJobFinishes"):
        problems.append(
            f"{name}: shutdownAfterJobFinishes has no effect on a selected cluster and is refused: take it out"
        )
    return problems


def cluster_problems(cluster: dict[str, Any], roles: Sequence[str]) -> list[str]:
    name, spec = _name(cluster), cluster["spec"]
    head, groups = spec.get("headGroupSpec"), spec.get("workerGroupSpecs", [])
    problems = []
    if not head:
        problems.append(f"{name}: spec.headGroupSpec is missing: add it")
    if spec.get("authOptions", {}).get("mode") != "token":
        problems.append(f"{name}: anybody on the network may run code: set spec.authOptions.mode to token")
    if not spec.get("rayVersion"):
        problems.append(
            f"{name}: spec.rayVersion is missing, which authOptions need: name the image's version of Ray"
        )
    if spec.get("enableInTreeAutoscaling") is not True and any(
        g.get("minReplicas") != g.get("maxReplicas") for g in groups
    ):
        problems.append(
            f"{name}: groups may grow, but nothing grows them: set spec.enableInTreeAutoscaling to true"
        )
    names = [g.get("groupName") for g in groups]
    problems += [
        f"{name}: groupName {n} is used twice: rename one"
        for n in sorted({str(n) for n in names if names.count(n) > 1})
    ]
    for group in groups:
        problems += group_problems(f"{name}, group {group.get('groupName')}", group)
    if head:
        problems += pod_problems(f"{name}, head", head)
    return problems or resource_problems(cluster, roles)


def group_problems(place: str, group: dict[str, Any]) -> list[str]:
    problems = [] if group.get("groupName") else [f"{place}: groupName is missing: name its role"]
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if not isinstance(low, int) or not isinstance(high, int):
        problems.append(f"{place}: minReplicas and maxReplicas are needed, as numbers: write both")
    elif low > high:
        problems.append(f"{place}: minReplicas {low} is more than maxReplicas {high}: lower or raise one")
    elif not low <= group.get("replicas", low) <= high:
        problems.append(
            f"{place}: replicas {group['replicas']} is not within minReplicas {low} and maxReplicas {high}: correct it"
        )
    return problems + pod_problems(place, group)


def pod_problems(place: str, group: dict[str, Any]) -> list[str]:
    problems = [
        f"{place}: rayStartParams.{key} is {value!r}, the values must be strings: put it into quotes"
        for key, value in group.get("rayStartParams", {}).items()
        if not isinstance(value, str)
    ]
    pod = group.get("template", {}).get("spec", {})
    containers = pod.get("containers", [])
    if not containers:
        problems.append(f"{place}: template.spec.containers is missing: add the container that runs Ray")
    volumes = {v.get("name") for v in pod.get("volumes", [])}
    for container in containers:
        if not container.get("image"):
            problems.append(
                f"{place}: container {container.get('name')} has no image: name the one of deploy/Dockerfile"
            )
        for mount in container.get("volumeMounts", []):
            if mount.get("name") not in volumes:
                problems.append(
                    f"{place}: mounts the volume {mount.get('name')}, which is none of its volumes: add it"
                )
    return problems


@contextmanager
def quiet() -> Iterator[None]:
    """What Ray's validation logs and prints is left out; what it raises is not."""
    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _autoscaling_config(cluster: dict[str, Any]) -> dict[str, Any]:
    cluster = copy.deepcopy(cluster)
    cluster["metadata"].setdefault("namespace", "default")
    with quiet():
        return _derive_autoscaling_config_from_ray_cr(cluster)


def resource_problems(cluster: dict[str, Any], roles: Sequence[str]) -> list[str]:
    """What Ray's autoscaler cannot read, and roles that no group offers."""
    try:
        types = _autoscaling_config(cluster)["available_node_types"]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ValidationError) as error:
        why = " ".join(str(error).split())
        return [
            f"{_name(cluster)}: Ray's autoscaler cannot read the groups' resources ({why}): write them as in deploy/kuberay.yaml"
        ]
    offered = {
        r
        for name, t in types.items()
        if name == HEAD or t["max_workers"]
        for r, n in t["resources"].items()
        if n
    }
    return [
        f"{_name(cluster)}: no group offers the resource {role}: add {role} to the resources in rayStartParams of one"
        for role in roles
        if role not in offered
    ]


def describe_groups(cluster: dict[str, Any]) -> list[str]:
    lines = []
    for name, node_type in _autoscaling_config(cluster)["available_node_types"].items():
        resources = (
            ", ".join(f"{n} {r}" for r, n in node_type["resources"].items() if n and r != "memory")
            or "no resources"
        )
        low, high = node_type["min_workers"], node_type["max_workers"]
        lines.append(f"{name}: {resources}" if name == HEAD else f"{name}: {low}-{high} nodes of {resources}")
    return lines
