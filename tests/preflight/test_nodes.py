"""GPUs that cannot run a plan. nvidia-smi is a script here: this machine has no GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

import launch
import preflight.gpus
import preflight.nodes
from preflight.gpus import Gpu, Machine, read_machine
from preflight.memory import GIB
from preflight.nodes import check_gpus, check_node
from tests.preflight.test_memory_fit import config_of, plan_of
from video_opd import ROOT
from video_opd.errors import ClusterError

H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "580.95.05", 9.0)
FP8 = ("teacher=models/Qwen3-VL-32B-Instruct-FP8", "teacher_pool.engine=vllm")


def machine(**changes) -> Machine:
    return Machine((replace(H100, **changes),), 13000, "13.0")


def check(node: Machine, *overrides: str, **resources: float) -> None:
    resources = resources or {"learner": 1, "rollout": 1, "teacher": 1}
    check_node("node-7", node, resources, plan_of(config_of("qwen3vl_8b.yaml", *overrides)))


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (
            Machine((replace(H100, driver="535.104.05"),), 12020, "13.0"),
            "node-7: driver 535.104.05 runs CUDA 12, but PyTorch is built for CUDA 13.0: install driver 580",
        ),
        (
            machine(name="V100", capability=7.0),
            "V100 has compute capability 7, dtype=bfloat16 of learner, rollout, teacher_pool needs 8",
        ),
        (
            machine(name="A100-SXM4-40GB", capability=8.0, memory_bytes=40960 << 20),
            "node-7, A100-SXM4-40GB: learner: 51 GiB of 40 GiB a GPU, 11.0 too many: learner.world_size=8",
        ),
    ],
)
def test_a_gpu_that_cannot_run_it_is_one_line(node, named):
    with pytest.raises(ClusterError) as caught:
        check(node)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "node",
    [
        machine(),
        machine(name="A100", capability=8.0, memory_bytes=81920 << 20),
        Machine((H100,), 13010, "12.9"),
        Machine((H100,), 0, "13.0"),  # libcuda was not found: torch itself will tell
        Machine((Gpu("T400", 2 << 30, "580.1", 7.5), H100), 13000, "13.0"),
        Machine((), 0, None),
    ],
)
def test_a_gpu_that_can_passes(node):
    check(node)


def test_a_node_of_one_role_needs_memory_for_that_alone():
    """As in cluster.yaml: learner and teacher on 80 GB, actors on 48."""
    l40s = machine(name="L40S", capability=8.9, memory_bytes=46068 << 20)
    check(l40s, rollout=1)
    with pytest.raises(ClusterError, match="node-7, L40S: teacher: 70 GiB of 45 GiB a GPU"):
        check(l40s, teacher=1)


def test_a_gpu_without_fp8_is_warned_of(caplog):
    check(machine(name="A100", capability=8.0), *FP8)
    assert "node-7: A100 has no FP8: vLLM computes with the teacher's FP8 weights in bfloat16" in caplog.text
    caplog.clear()
    check(machine(name="L40S", capability=8.9), *FP8)
    check(machine(name="A100", capability=8.0), *FP8, learner=1)
    assert not caplog.text


def test_a_gpu_too_old_for_fp8_is_named():
    with pytest.raises(ClusterError, match=r"teacher_pool, and FP8, needs 8$"):
        check(machine(capability=7.5), *FP8)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine with an A100 of 40 GB and a small GPU, whose driver is too old."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    lines = ["NVIDIA A100-SXM4-40GB, 40960, 535.104.05, 8.0", "NVIDIA T400, 2048, 535.104.05, 7.5"]
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.setattr(preflight.gpus, "_driver_cuda", lambda: 12020)
    monkeypatch.setattr(preflight.gpus.runpy, "run_path", lambda _: {"cuda": "13.0"})


def test_a_machine_is_read_by_nvidia_smi(nvidia_smi):
    found = read_machine()
    assert found.best == Gpu("NVIDIA A100-SXM4-40GB", 40 * GIB, "535.104.05", 8.0)
    assert (len(found.gpus), found.driver_cuda, found.torch_cuda) == (2, 12020, "13.0")


def test_a_driver_too_old_to_say_the_capability_is_still_refused(nvidia_smi, tmp_path):
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text('#!/bin/sh\ncase "$1" in *compute_cap*) exit 2;; esac\necho "V100, 32768, 470.57.02"\n')
    with pytest.raises(
        ClusterError, match=r"driver 470\.57\.02 runs CUDA 12, but PyTorch is built for CUDA 13"
    ):
        check(read_machine())


def test_a_gpu_that_shares_the_hosts_memory_is_not_planned_for(nvidia_smi, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 580.95.05, 12.1'\n")
    assert not read_machine().gpus


def test_a_machine_without_gpus_has_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_machine() == Machine((), 0, None)


def test_a_dry_run_plans_for_the_gpu_that_is_here_and_warns(nvidia_smi, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = str(Path(ROOT / "configs" / "qwen3vl_8b.yaml"))
    launch.main(["--config", config, "--dry-run"])
    out = capsys.readouterr().out
    assert "of  40.0 a GPU" in out
    assert "WARNING   this machine cannot run it: driver 535.104.05 runs CUDA 12" in out


def test_each_node_that_has_gpus_is_asked_without_taking_one(monkeypatch):
    nodes = [{"NodeID": f"{n:056x}", "NodeManagerHostname": f"node-{n}", "Alive": True} for n in range(3)]
    has = ({"GPU": 8.0, "rollout": 1}, {"CPU": 4.0}, {"GPU": 1.0, "teacher": 1})
    asked = []
    monkeypatch.setattr(
        "ray.remote_function.RemoteFunction._remote", lambda _, **options: asked.append(options)
    )
    monkeypatch.setattr(
        preflight.nodes.ray, "nodes", lambda: [n | {"Resources": r} for n, r in zip(nodes, has, strict=True)]
    )
    small = machine(memory_bytes=40 << 30)
    monkeypatch.setattr(
        preflight.nodes.ray, "get", lambda answers, timeout: [machine(), small][: len(answers)]
    )
    with pytest.raises(ClusterError, match=r"^node-2, .*: teacher: 70 GiB of 40 GiB"):
        check_gpus(plan_of(config_of("qwen3vl_8b.yaml")))
    assert [options["scheduling_strategy"].node_id for options in asked] == [
        nodes[0]["NodeID"],
        nodes[2]["NodeID"],
    ]
    assert all(options["num_cpus"] == 0 and not options.get("num_gpus") for options in asked)


def test_a_run_without_gpus_asks_no_node(monkeypatch):
    monkeypatch.setattr(preflight.nodes.ray, "nodes", lambda: pytest.fail("asked"))
    plan = plan_of(config_of("qwen3vl_8b.yaml"))
    on_cpu = {
        s: getattr(plan.config, s).model_copy(update={"num_gpus": 0})
        for s in ("learner", "rollout", "teacher_pool")
    }
    check_gpus(replace(plan, config=plan.config.model_copy(update=on_cpu)))
