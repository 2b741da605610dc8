"""The plans of disk and object store: what counts, what is said, and where a launch ends."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import launch
from preflight import disk
from preflight.disk import checkpoint_bytes, disk_plan
from preflight.inputs import SHAPES, make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan
from preflight.model_shapes import find_shapes
from preflight.object_store import small_stores, store_plan
from tests.fakes import make_prompt
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config, load_demo
from video_opd.errors import ConfigError

B8 = ROOT / "configs" / "qwen3vl_8b.yaml"
STUDENT = find_shapes("models/Qwen3-VL-8B-Instruct", SHAPES)
NO_SPLITS: Any = SimpleNamespace(train=None, eval=None)


IN_STORE = "learner.weight_transfer=object_store"


def config_8b(*options: str) -> Config:
    return load_config(B8, list(options))


def gigabytes(*options: str) -> float:
    return checkpoint_bytes(config_8b(*options), STUDENT) / 1e9


def test_a_checkpoint_of_8_billion_parameters_has_masters_moments_and_the_student():
    trained, frozen = 8.191, 0.576
    full = 12 * trained + 2 * (trained + 2 * frozen)
    assert gigabytes() == pytest.approx(full, rel=0.01), "ZeRO-3: frozen weights beside the student"
    assert gigabytes("learner.zero_stage=1") == pytest.approx(full + 2 * trained, rel=0.01)
    assert gigabytes("learner.zero_stage=2") == pytest.approx(full + 2 * trained + 2 * frozen, rel=0.01)
    assert gigabytes("learner.lora_rank=16") == pytest.approx(2 * 2 * (trained + frozen), rel=0.05)
    plain = ("learner.zero_stage=0", "learner.dtype=float32")
    assert gigabytes(*plain) == pytest.approx(8 * trained + 2 * 4 * (trained + frozen), rel=0.01)


@pytest.mark.parametrize(
    ("options", "checkpoints", "students"),
    [
        ([], 1, 1),  # at the end
        (["checkpoint_every=20"], 4, 1),
        (["checkpoint_every=20", "checkpoint_keep_last=1", "checkpoint_keep_best=2"], 2, 1),
        (["checkpoint_every=20", "checkpoint_keep_best=2", "eval_every=20"], 6, 2),
        (["checkpoint_every=20", "checkpoint_url=s3://bucket/runs"], 5, 1),
        (["checkpoint_every=300"], 2, 1),
        (["snapshot_every=5", "snapshot_keep_last=4"], 1, 6),
    ],
)
def test_as_many_are_counted_as_there_are_at_one_time(options, checkpoints, students):
    config = load_demo(["num_steps=400", "checkpoint_every=0", "eval_every=0", *options])
    plan = disk_plan(config, STUDENT, NO_SPLITS, None)
    assert (plan.num_checkpoints, plan.num_students) == (checkpoints, students)
    total = checkpoints * plan.checkpoint_bytes + students * plan.student_bytes
    assert plan.needed_bytes == total + plan.frame_bytes


def test_frames_count_once_a_clip_and_where_their_cache_is(tmp_path, monkeypatch):
    draft: Any = SimpleNamespace(
        train=SimpleNamespace(prompts=[make_prompt("a", clip_id="x"), make_prompt("b", clip_id="x")]),
        eval=SimpleNamespace(prompts=[make_prompt("c")]),
    )
    config = load_demo([f"video.cache_dir={tmp_path}/frames", f"runs_dir={tmp_path}/runs"])
    assert disk_plan(config, STUDENT, draft, None).frame_bytes == 2 * 24 * 32 * 32 * 3
    assert disk_plan(config, STUDENT, NO_SPLITS, None).frame_bytes == config.video.cache_bytes
    devices = {tmp_path: 1, Path(tmp_path.anchor): 2}
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "other.arrow").write_bytes(bytes(1000))
    grows = disk_plan(config, STUDENT, NO_SPLITS, None).frame_bytes
    assert grows == config.video.cache_bytes - 1000
    monkeypatch.setattr(disk.os, "stat", lambda path: SimpleNamespace(st_dev=devices.get(path, 3)))
    monkeypatch.setattr(disk, "_existing", lambda path: tmp_path if "runs" in path.parts else path)
    assert disk_plan(config, STUDENT, draft, None).frame_bytes == 0


def test_a_file_that_another_run_removes_meanwhile_counts_as_nothing(tmp_path, monkeypatch):
    config = load_demo([f"video.cache_dir={tmp_path}/frames", f"runs_dir={tmp_path}/runs"])
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "kept.arrow").write_bytes(bytes(1000))
    found = [(str(tmp_path / "frames"), [], ["kept.arrow", "gone.arrow"])]
    monkeypatch.setattr(disk.os, "walk", lambda folder: found)
    assert disk_plan(config, STUDENT, NO_SPLITS, None).frame_bytes == config.video.cache_bytes - 1000


def test_what_a_resumed_run_has_already_is_its_own(tmp_path, monkeypatch):
    config = load_demo([f"runs_dir={tmp_path}"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (weights := tmp_path / "run" / "checkpoints" / "a").write_bytes(bytes(3 << 20))
    (tmp_path / "run" / "checkpoints" / "b").hardlink_to(weights)
    (tmp_path / "run" / "set-aside").mkdir()
    (tmp_path / "run" / "set-aside" / "c").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: (1 << 40, 0, 5 << 20))
    free = [disk_plan(config, STUDENT, NO_SPLITS, run).free_bytes for run in (None, tmp_path / "run")]
    assert free == [5 << 20, 8 << 20]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: (0, 0, 0))
    assert disk_plan(config, STUDENT, NO_SPLITS, None).free_bytes is None


def planned(free_gib: int | None, *options: str) -> Any:
    config = config_8b(*options)
    plan = disk_plan(config, STUDENT, NO_SPLITS, None)
    return replace(plan, frame_bytes=0, free_bytes=None if free_gib is None else free_gib * GIB)


def test_a_disk_that_is_too_small_is_one_line_with_what_would_fit():
    disk.check_disk(planned(453))
    disk.check_disk(planned(None))  # a file system that does not say
    for free_gib, fits in (
        (452, "set checkpoint_keep_last=2, or "),
        (250, "set checkpoint_keep_last=1, or "),
        (100, ""),
    ):
        with pytest.raises(ConfigError) as caught:
            disk.check_disk(planned(free_gib))
        found = f"{free_gib}.0 GiB are free, the run fills 452.1 GiB: {fits}choose a runs_dir with more room"
        assert str(caught.value).endswith(found) and "runs_dir=" in str(caught.value)


def test_a_launch_ends_before_anything_starts_where_the_disk_is_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: (1 << 40, 0, 1 << 20))
    monkeypatch.setattr(launch, "start_ray", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr(launch, "prepare", lambda config, resumes: make_draft(config))
    config = ["--config", str(ROOT / "configs" / "qwen3vl_8b.yaml"), "--gpu-memory-gib", "80"]
    assert launch.main([*config, f"runs_dir={tmp_path}/runs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: runs_dir=") and not (tmp_path / "runs" / "x").exists()


# The object store


def node(address: str, store_gib: float, alive: bool = True, **roles: float) -> dict[str, Any]:
    resources = roles | {"object_store_memory": store_gib * GIB}
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": resources}


def stores(*options: str):
    config = config_8b(*options)
    return store_plan(memory_plan(config, make_draft(config), 80))


def test_the_store_is_planned_for_one_version_of_the_weights():
    assert stores(IN_STORE).weights / 1e9 == pytest.approx(1.25 * 2 * 8.767, rel=0.01)
    assert stores().weights == stores("learner.weight_transfer=collective").weights == 0
    assert stores(IN_STORE, "loss.kind=sft", "curriculum.kind=uniform", "rollout.num_actors=0").weights == 0
    lagging, sampled = stores(IN_STORE, "max_policy_lag=2"), stores("rollout.rollouts_per_prompt=3")
    assert lagging.weights == stores(IN_STORE).weights
    assert lagging.trajectories == sampled.trajectories == 3 * stores().trajectories
    of_teacher = stores("loss.kind=opd_topk").trajectories
    assert of_teacher > stores().trajectories + 2 * 32 * 64 * 64 * 8 - 1
    of_student = stores("loss.kind=opd_topk", "loss.top_k_of=student").trajectories
    assert of_student == of_teacher + (of_teacher - stores().trajectories) // 2, "its ids travel twice"


def test_the_store_holds_the_versions_that_a_teacher_follows():
    alone = stores(IN_STORE)
    student = config_8b().student
    own = f"teachers=[{{name: self, model: '{student}', crop_margin_frac: 0.5, follows: student, delay: 3}}]"
    following = "teacher=null", own, "loss.kind=opd_topk", "curriculum.kind=uniform", "max_policy_lag=1"
    plan = stores(*following)
    assert plan.weights == alone.weights and alone.followed == 0
    assert plan.followed == pytest.approx(5 * plan.weights / 1.25), "of versions n - 4 to n"
    gib = (plan.weights + plan.trajectories) / GIB + 0.1
    assert small_stores(plan, [node("10.0.0.1", gib, rollout=1), node("10.0.0.2", gib, teacher=1)]) is None
    said = small_stores(plan, [node("10.0.0.1", gib, learner=1)])
    assert said and f"={plan.weights + plan.trajectories + plan.followed} " in said
    assert small_stores(plan, [node("10.0.0.1", plan.weights / GIB, teacher=1)]), "it loads a version"


@pytest.mark.parametrize("way", ["object_store", "collective"])
def test_adapters_take_megabytes_of_the_store_whatever_the_way_of_weights(way):
    of_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)  # q, o; k, v; MLP
    planned = stores("learner.lora_rank=16", f"learner.weight_transfer={way}")
    assert planned.weights == 1.25 * 2 * 16 * 36 * of_layer


def test_a_store_that_is_too_small_is_named_with_what_helps():
    head, plan = node("10.0.0.1", 4), stores(IN_STORE)
    fits = [
        head,
        node("10.0.0.2", 22, learner=8),
        node("10.0.0.3", 22, rollout=1),
        node("10.0.0.4", 1, teacher=1),
    ]
    assert small_stores(plan, fits) is None
    assert small_stores(plan, [*fits, node("10.0.0.5", 1, alive=False, rollout=1)]) is None
    said = small_stores(plan, [*fits, node("10.0.0.6", 8, rollout=1)])
    assert said and "10.0.0.6 has 8.0 GiB, the run keeps 20.4 GiB there (1 of 5 nodes" in said
    needed = plan.weights + plan.trajectories
    assert said.endswith(f"start Ray with --object-store-memory={needed} and a /dev/shm above it")
    assert small_stores(plan, [node("10.0.0.1", 0.0001)])
