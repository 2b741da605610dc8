"""What vLLM gets, engine by engine; how engines of one GPU start; shares of a GPU."""

import os
import sys
import threading
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from video_opd.cluster.placement import bundles_of, resources_of
from video_opd.config import RolloutConfig
from video_opd.config_teachers import TeacherConfig
from video_opd.models import shared_gpu, vllm_engine
from video_opd.models.shared_gpu import keep_to_share, starting_alone
from video_opd.models.vllm_engine import memory_options, parallel_options, start_vllm

GIB = 1 << 30
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch) -> dict[str, Any]:
    """A GPU of 80 GiB that is not here: what torch is told of its memory, and a folder for locks."""
    told: dict[str, Any] = {}
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda f: told.update(fraction=f))
    monkeypatch.setattr(shared_gpu.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    return told


def is_locked(folder: Path) -> bool:
    with next(folder.rglob("gpu-3.lock")).open() as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_gpus": 1}, {"gpu_memory_utilization": 0.85}),
        ({"num_gpus": 0.35}, {"gpu_memory_utilization": 0.85}),  # alone, as `python -m evaluation`
        (
            {"num_gpus": 1, "kv_cache_bytes": GIB},
            {"kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.85},
        ),
        (
            {"num_gpus": 0.35, "kv_cache_bytes": GIB},
            {"kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.01},
        ),
        ({"num_gpus": 0, "kv_cache_bytes": GIB}, {"kv_cache_memory_bytes": GIB}),
    ],
)
@pytest.mark.parametrize("section", [RolloutConfig, TeacherConfig])
def test_on_a_shared_gpu_vllm_neither_measures_nor_asks_for_free_memory(section, options, expected):
    assert memory_options(section(**options)) == expected


@pytest.mark.parametrize("section", [RolloutConfig, TeacherConfig])
def test_vllm_cuts_a_model_where_the_bundles_are(monkeypatch, section):
    assert parallel_options(section()) == {}
    more: dict[str, Any] = {"engine": "vllm"} if section is TeacherConfig else {}
    in_parts = section(tensor_parallel=2, **more)
    monkeypatch.setattr(vllm_engine.ray, "is_initialized", lambda: False)
    assert parallel_options(in_parts)["distributed_executor_backend"] == "mp"
    monkeypatch.setattr(vllm_engine.ray, "is_initialized", lambda: True)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert parallel_options(in_parts) == options
    on_cpu = section(tensor_parallel=2, num_gpus=0, **more)
    assert parallel_options(on_cpu) == options | {"distributed_executor_backend": "mp"}


def test_an_engine_in_parts_takes_a_bundle_for_each_and_all_on_one_node():
    rollout = RolloutConfig(tensor_parallel=4, num_cpus=2)
    shard = {"CPU": 2, "GPU": 1}
    assert bundles_of(rollout, "rollout") == [shard | {"rollout": 1}, shard, shard, shard]
    assert resources_of(rollout, "rollout") == {"rollout": 1, "CPU": 8, "GPU": 4}
    assert resources_of(RolloutConfig(num_gpus=0), "rollout") == {"rollout": 1, "CPU": 1}


@pytest.mark.parametrize(("num_gpus", "is_alone"), [(0.35, True), (1, False)])
def test_while_an_engine_starts_no_other_starts_on_its_gpu(tmp_path, monkeypatch, gpu, num_gpus, is_alone):
    seen: dict[str, Any] = {}

    def llm(model: str, **options: Any) -> SimpleNamespace:
        seen.update(options, locked=bool(list(tmp_path.rglob("*.lock"))) and is_locked(tmp_path))
        return SimpleNamespace()

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    start_vllm("student", RolloutConfig(num_gpus=num_gpus, kv_cache_bytes=GIB), seed=5)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "in this process"
    assert seen["locked"] == is_alone
    assert (seen["kv_cache_memory_bytes"], seen["seed"]) == (GIB, 5)
    if is_alone:
        assert gpu == {"fraction": pytest.approx(0.35 - 1 / 80)}, "its share, less the context"
        assert not is_locked(tmp_path), "the next may start"


def test_engines_of_one_gpu_start_one_after_another_and_those_of_another_do_not_wait(monkeypatch):
    events: list[str] = []
    begun, end = threading.Event(), threading.Event()

    def first() -> None:
        with starting_alone(0.5):
            events.append("first begins")
            begun.set()
            assert end.wait(PATIENCE_S)
            events.append("first ends")

    def second() -> None:
        with starting_alone(0.5):
            events.append("second begins")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert begun.wait(PATIENCE_S)
    with starting_alone(1), starting_alone(0):
        events.append("a whole GPU")
    with monkeypatch.context() as other:
        other.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "4"})
        with starting_alone(0.5):
            events.append("another GPU")
    threads[1].start()  # only now: environ is that of all threads
    threads[1].join(0.2)  # room to begin too early
    end.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert events[1:] == ["a whole GPU", "another GPU", "first ends", "second begins"]


def test_a_whole_gpu_is_not_limited(gpu):
    keep_to_share(1)
    keep_to_share(0)
    assert gpu == {}
