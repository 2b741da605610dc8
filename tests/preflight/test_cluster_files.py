"""cluster.yaml and deploy/: Ray accepts them, --check-cluster finds nothing wrong, and what they say."""

import json
import re

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from preflight.cluster_file import ROLES
from preflight.disk import disk_plan
from preflight.inputs import make_draft
from preflight.memory_fit import memory_plan
from preflight.object_store import store_plan
from tests.preflight.cluster_files import CLOUDS, FILES, RAY_UP, load
from video_opd import ROOT
from video_opd.config_file import load_config


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
            "RAY_prestart_worker_first_driver=0",
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
        (gigabytes,) = re.findall(r"^--shm-size=(\d+)g$", option)
        (store,) = re.findall(r"--object-store-memory=(\d+)", start)
        assert int(store) < int(gigabytes) * 10**9


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


def starts(name: str) -> dict[str, str]:
    """What starts Ray on the head, and on those that have a learner or an actor."""
    if name in CLOUDS:
        config = load(name)
        return {node: config[f"{node}_start_ray_commands"][1] for node in ("head", "worker")}
    spec = load(name)[0]["spec"]
    groups = {g["groupName"]: g["rayStartParams"] for g in spec["workerGroupSpecs"]}
    stores = {"head": spec["headGroupSpec"]["rayStartParams"], **groups}
    return {n: f"--object-store-memory={params['object-store-memory']}" for n, params in stores.items()}


@pytest.mark.parametrize("name", [*CLOUDS, "deploy/kuberay.yaml"])
def test_the_object_stores_hold_what_the_run_of_8_gpus_keeps_there(name: str):
    config = load_config(ROOT / "configs/qwen3vl_8b.yaml", [])
    plan = store_plan(memory_plan(config, make_draft(config), 80))
    for node, start in starts(name).items():
        (store,) = re.findall(r"--object-store-memory=(\d+)", start)
        assert int(store) >= plan.trajectories + (plan.weights if node != "head" else 0), node


@pytest.mark.parametrize("name", CLOUDS)
def test_the_heads_disk_holds_the_checkpoints_of_the_run_of_8_gpus(name: str):
    config = load_config(ROOT / "configs/qwen3vl_8b.yaml", [])
    draft = make_draft(config)
    needed = disk_plan(config, draft.student, draft, None).needed_bytes
    sizes = re.findall(
        r"(?:VolumeSize|diskSizeGb)['\"]?: (\d+)", str(load(name)["available_node_types"]["head"])
    )
    assert [int(size) * 10**9 >= needed + 60 * 10**9 for size in sizes] == [True], "and the image"


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_build_the_image_from_what_they_were_sent(name: str):
    config = load(name)
    (folder,) = [target for target, source in config["file_mounts"].items() if source == "."]
    build = config["initialization_commands"][-1]
    assert f"cd /tmp/ray_tmp_mount/{config['cluster_name']}{folder} && docker build" in build
    assert f"--target gpu --tag {config['docker']['image']} --file deploy/Dockerfile ." in build
    assert config["docker"]["pull_before_run"] is False
    assert f"WORKDIR {folder}\n" in (ROOT / "deploy/Dockerfile").read_text()
