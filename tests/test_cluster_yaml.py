"""cluster.yaml is what Ray accepts, and what this project's processes ask for."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())


def test_ray_accepts_it():
    validate_config(prepare_config(CLUSTER))


def test_every_role_has_a_node_type_that_offers_its_resource():
    types = CLUSTER["available_node_types"]
    for role in ("learner", "rollout", "teacher"):
        assert types[role]["resources"][role] >= 1
        assert 1 <= types[role]["min_workers"] <= types[role]["max_workers"]
    assert sum(t.get("max_workers", 0) for t in types.values()) <= CLUSTER["max_workers"]
    assert CLUSTER["auth"]["ssh_user"]
