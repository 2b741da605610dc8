"""What fits and what is refused, with the change that helps; --dry-run."""

import json
from pathlib import Path

import pytest

import launch
from preflight.activations import text_layer_passing
from preflight.inputs import SHAPES, check_shards
from preflight.memory import GIB, ProcessMemory, RoleMemory, workload_of_budget
from preflight.memory_fit import MemoryPlan, check_fits, host_total
from preflight.model_shapes import find_shapes, parse_shapes
from preflight.options import asked_attention
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.config_teachers import TeacherModel
from video_opd.errors import ConfigError, InputError
from video_opd.models.lengths import limits

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
WHOLE_PASSES = "learner.tree_tokens=null"
VLLM_TEACHER = ("teacher_pool.engine=vllm",)
HARDWARE = ROOT / "docs" / "hardware.md"


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / name, overrides)


def plan_of(config: Config, gpu_gib: float = 80, host_bytes: int = 1 << 50) -> MemoryPlan:
    student = find_shapes(config.student, SHAPES)
    teacher = find_shapes(config.teacher, SHAPES) if config.teacher else None
    work = workload_of_budget(config.video, student)
    return MemoryPlan(config, student, teacher, work, work, int(gpu_gib * GIB), host_bytes)


def refusal(plan: MemoryPlan) -> str:
    with pytest.raises(ConfigError) as caught:
        check_fits(plan, one_machine=True)
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "gpu_gib", "named"),
    [
        (["learner.gradient_checkpointing=false"], 80, "learner.gradient_checkpointing=true would need"),
        (["learner.zero_stage=0"], 80, "learner.zero_stage=1 would need"),
        (["learner.zero_stage=1"], 66, "learner.zero_stage=2 would need"),
        ([WHOLE_PASSES, "learner.micro_batch=8"], 75, "learner.micro_batch=2 would need"),
        ([WHOLE_PASSES, "learner.micro_batch=8"], 75, "learner.tree_tokens=16000 would need"),
        (["learner.tree_tokens=40000"], 55, "learner.tree_tokens=16000 would need"),
        (["learner.world_size=2"], 60, "learner.world_size=4 would need"),
        (
            ["learner.world_size=64"],
            13,
            'learner.deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} would need',
        ),
        (["learner.world_size=1", "learner.zero_stage=0"], 48, "learner.lora_rank=16 would need"),
        (
            ["teacher_pool.engine=transformers", "teacher_pool.micro_batch=1"],
            76,
            "curriculum.num_teacher_predictions=2 would need",
        ),
        (
            ["teacher_pool.num_gpus=0.97", "teacher_pool.gpu_memory_utilization=0.98"],
            80,
            "teacher_pool.gpu_memory_utilization=0.9 would need",
        ),
        (["rollout.gpu_memory_utilization=1.0"], 80, "rollout.gpu_memory_utilization=0.95 would need"),
        (["rollout.num_gpus=0.5"], 80, "rollout.gpu_memory_utilization=0.45 would need"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_smallest_change_that_would(overrides, gpu_gib, named):
    message = refusal(plan_of(config_of("qwen3vl_8b.yaml", *overrides), gpu_gib))
    assert named in message, message


def test_weights_that_ipc_lends_out_count_where_they_are_copies():
    ipc = ("learner.weight_transfer=ipc", "learner.micro_batch=1")

    def learner(*overrides: str) -> ProcessMemory:
        roles = plan_of(config_of("qwen3vl_4b_2gpu.yaml", *ipc, *overrides)).roles
        return next(r.device for r in roles if r.role == "learner" and r.device)

    assert learner().largest_phase == "publishing"
    assert learner().terms["weights sent"] == learner("learner.zero_stage=2").terms["weights"]
    in_parts = learner("learner.weight_transfer=object_store").phases["publishing"]["weights sent"]
    assert in_parts == (256 << 20) + 2 * 151_936 * 2560  # a bucket, and the embeddings
    for whole in (
        ["learner.zero_stage=2"],
        ["learner.lora_rank=16"],
        ["learner.weight_transfer=object_store", "learner.zero_stage=2"],
    ):
        assert learner(*whole).phases["publishing"] == {"weights sent": 0}
    message = refusal(plan_of(config_of("qwen3vl_4b_2gpu.yaml", *ipc), 75.5))
    assert 'learner.weight_transfer="object_store" would need' in message


def test_what_nccl_receives_weights_in_counts_on_both_sides():
    def peaks(way: str, role: str) -> dict[str, int]:
        roles = plan_of(config_of("qwen3vl_8b.yaml", f"learner.weight_transfer={way}")).roles
        device = next(r.device for r in roles if r.role == role)
        assert device
        return {name: sum(terms.values()) for name, terms in device.phases.items()}

    buffer = (256 << 20) + 2 * 151_936 * 4096  # a bucket, and the embeddings
    assert peaks("auto", "learner")["publishing"] == 3 * buffer
    assert peaks("auto", "actors")["new weights"] == 2 * buffer
    assert "new weights" not in peaks("object_store", "actors")


def test_a_teacher_in_parts_has_a_share_of_the_weights_in_each():
    def teacher(*overrides: str) -> RoleMemory:
        roles = plan_of(config_of("qwen3vl_8b.yaml", "teacher_pool.engine=vllm", *overrides)).roles
        return next(r for r in roles if r.role == "teacher")

    whole, parts = teacher(), teacher("teacher_pool.tensor_parallel=4")
    assert whole.device and parts.device
    assert parts.processes == 4 * whole.processes
    assert parts.device.held["weights"] == whole.device.held["weights"] // 4
    assert parts.device.held["KV cache"] > whole.device.held["KV cache"]  # what the weights leave


@pytest.mark.parametrize(
    ("num_gpus", "engine", "other"), [(1, "vllm", "transformers"), (0, "transformers", "vllm")]
)
def test_what_is_known_before_a_start_is_known_of_the_engine_that_auto_stands_for(num_gpus, engine, other):
    def known(*chosen: str) -> list:
        config = config_of("qwen3vl_8b.yaml", f"teacher_pool.num_gpus={num_gpus}", *chosen)
        return [plan_of(config).roles, limits(config, True), list(asked_attention(config))]

    assert known() == known(f"teacher_pool.engine={engine}")
    differ = zip(known(), known(f"teacher_pool.engine={other}"), strict=True)
    assert all(a != b for a, b in differ)


def test_an_actor_in_shards_is_planned_as_a_teacher_is_and_advised():
    def actors(*overrides: str) -> RoleMemory:
        return next(r for r in plan_of(config_of("qwen3vl_8b.yaml", *overrides)).roles if r.role == "actors")

    whole, parts = actors(), actors("rollout.tensor_parallel=2")
    assert whole.device and parts.device
    assert parts.processes == 2 * whole.processes
    assert parts.device.held["weights"] == whole.device.held["weights"] // 2
    config = config_of("qwen3vl_8b.yaml", "learner.world_size=64", "rollout.enforce_eager=true")
    assert "rollout.tensor_parallel=2 would need" in refusal(plan_of(config, 21))


@pytest.mark.parametrize(
    ("model", "shards", "possible"),
    [
        ("Qwen3-VL-8B-Instruct", 3, "1, 2, 4, 8, 16"),
        ("Qwen2.5-VL-7B-Instruct", 8, "1, 2, 4"),  # 28 heads
        ("Qwen2.5-VL-3B-Instruct", 8, "1, 2, 4"),  # a vision MLP of 3420
    ],
)
def test_shards_that_vllm_cannot_make_are_refused_with_those_that_it_can(model, shards, possible):
    shapes = find_shapes(f"models/{model}", SHAPES)
    with pytest.raises(ConfigError, match=rf"^rollout.tensor_parallel={shards} does not divide {model}"):
        check_shards("rollout", shards, shapes)
    with pytest.raises(ConfigError, match=f"use one of {possible}$"):
        check_shards("rollout", shards, shapes)
    for n in possible.split(", "):
        check_shards("rollout", int(n), shapes)


@pytest.mark.parametrize("section", ["rollout", "teacher_pool"])
def test_a_dry_run_refuses_shards_that_vllm_cannot_make(section, capsys):
    config = ["--dry-run", "--config", str(ROOT / "configs" / "qwen3vl_8b.yaml"), "teacher_pool.engine=vllm"]
    assert launch.main([*config, f"{section}.tensor_parallel=3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {section}.tensor_parallel=3 does not divide Qwen3-VL")


@pytest.mark.parametrize(("gpu_gib", "tokens"), [(80, 16384), (48, 8192)])
def test_vllm_fills_its_share_and_vision_and_cuda_come_on_top(gpu_gib, tokens):
    plan = plan_of(config_of("qwen3vl_4b_2gpu.yaml", "rollout.num_gpus=1"), gpu_gib)
    actors = next(r for r in plan.roles if r.role == "actors").device
    assert actors
    counted = sum(actors.held.values()) - actors.held["CUDA context"]
    passing = tokens * text_layer_passing(plan.student, 2)
    assert counted + passing == int(plan.config.rollout.gpu_memory_utilization * plan.gpu_bytes)
    assert actors.held["input buffers"] == 2 * tokens * plan.student.text.hidden * 4  # three of deepstack
    video = actors.phases["prefill"]
    assert video["one layer"] >= passing and video["pixels"] > 0


def test_a_teacher_on_vllm_has_logits_of_a_thousand_rows_at_once():
    """vLLM's second model runner, which GPUs use; the first, on a CPU, has those of all tokens."""
    on_gpu, on_cpu = (
        next(
            r for r in plan_of(config_of("qwen3vl_8b.yaml", *VLLM_TEACHER, *cpu)).roles if r.role == "teacher"
        )
        for cpu in ((), ("teacher_pool.num_gpus=0",))
    )
    assert on_gpu.device and on_cpu.device is None
    assert on_gpu.device.phases["logits"] == {"logits": 1024 * 151936 * 2 * 2}
    scaled = plan_of(config_of("qwen3vl_8b.yaml", *VLLM_TEACHER, "rollout.temperature=0.9"))
    (scaled,) = (r for r in scaled.roles if r.role == "teacher")
    assert scaled.device and scaled.device.phases["logits"] == {"logits": 1024 * 151936 * (2 * 2 + 4)}
    assert on_cpu.host.phases["logits"]["logits"] > 10 * 151936 * 1024 * 6


def test_of_several_teachers_each_has_its_replicas():
    config = config_of("qwen3vl_8b.yaml")
    several = tuple(TeacherModel(name=name, model="models/Qwen3-VL-32B-Instruct") for name in ("a", "b"))
    roles = plan_of(config).of(config.model_copy(update={"teachers": several, "teacher": None}))
    assert {r.role: r.processes for r in roles}["teacher"] == 2 * config.teacher_pool.num_replicas


def test_the_named_change_does_fit_and_the_next_larger_value_does_not():
    message = refusal(plan_of(config_of("qwen3vl_8b.yaml", WHOLE_PASSES, "learner.micro_batch=16"), 75))
    assert "learner.micro_batch=2 would need 58" in message
    learner, *_ = plan_of(config_of("qwen3vl_8b.yaml", WHOLE_PASSES, "learner.micro_batch=2"), 75).roles
    assert learner.device and round(learner.device.peak_bytes / GIB) == 58
    learner, *_ = plan_of(config_of("qwen3vl_8b.yaml", WHOLE_PASSES, "learner.micro_batch=4"), 75).roles
    assert learner.device and learner.device.peak_bytes > 75 * GIB


def test_several_changes_are_named_where_none_alone_is_enough():
    config = config_of(
        "qwen3vl_8b.yaml",
        "learner.world_size=1",
        "learner.zero_stage=0",
        "learner.gradient_checkpointing=false",
    )
    assert "learner.gradient_checkpointing=true learner.zero_stage=3" in refusal(plan_of(config))


def test_what_no_change_makes_fit_says_so():
    assert "none of its options makes it fit" in refusal(plan_of(config_of("qwen3vl_8b.yaml"), 4))


def test_a_run_without_gpus_must_fit_in_the_machine():
    config = config_of("demo.yaml", "teacher=null", "loss={kind: sft}")
    shapes = parse_shapes(json.loads((ROOT / "demo/models/student/config.json").read_text()), "demo", "demo")
    work = workload_of_budget(config.video, shapes)
    plan = MemoryPlan(config, shapes, None, work, work, int(80 * GIB), host_bytes=1 << 50)
    check_fits(plan, one_machine=True)
    total = host_total(plan.roles)
    small = MemoryPlan(config, shapes, None, work, work, int(80 * GIB), host_bytes=total - 1)
    assert "all processes together" in refusal(small)
    check_fits(small, one_machine=False)  # a launch refuses only what is plainly impossible


GPU_CONFIGS = [c.name for c in CONFIGS if c.name != "demo.yaml"]


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_every_config_fits_and_the_docs_have_its_numbers(name):
    plan = plan_of(config_of(name))
    check_fits(plan, one_machine=False)
    check_fits(plan_of(config_of(name), 79), one_machine=False)  # what a GPU "of 80 GB" has
    (row,) = [line for line in HARDWARE.read_text().splitlines() if line.startswith(f"| `{name}`")]
    for role, cell in zip([r for r in plan.roles if r.device], row.split(" | ")[2:], strict=True):
        assert role.device
        share = "" if role.gpu_share == 1 else f" of {role.gpu_share * 80:.0f}"
        assert cell.startswith(f"{role.processes} x {role.device.peak_bytes / GIB:.1f}{share} GiB"), role


def test_a_32b_student_needs_offload_or_adapters():
    """The numbers of docs/hardware.md."""
    message = refusal(plan_of(config_of("qwen3vl_32b.yaml", "learner.deepspeed={}")))
    assert message.startswith("learner: 164 GiB of 80 GiB a GPU, 83.8 too many: learner.world_size=16 would")
    assert "offload_optimizer" in message and "or learner.lora_rank=16 would need 41" in message
    hosts = [
        host_total(plan_of(config_of("qwen3vl_32b.yaml", *overrides)).roles)
        for overrides in ([], ["learner.deepspeed={}", "learner.lora_rank=16"])
    ]
    assert [round(n / GIB) for n in hosts] == [783, 44]
    text = " ".join(HARDWARE.read_text().split())
    assert "needs 41.1 GiB and the hosts 44 GiB instead of 783" in text and "164 GiB of 80" in text


def test_a_peak_is_what_is_held_and_the_largest_phase():
    memory = ProcessMemory({"weights": 10}, {"a": {"x": 5, "y": 1}, "b": {"z": 4}})
    assert (memory.peak_bytes, memory.largest_phase, memory.terms) == (
        16,
        "a",
        {"weights": 10, "x": 5, "y": 1},
    )
    assert ProcessMemory({"weights": 10}, {}).peak_bytes == 10


def test_a_role_that_is_not_run_takes_nothing():
    config = config_of(
        "qwen3vl_8b.yaml", "loss={kind: sft}", "curriculum.kind=uniform", "rollout.num_actors=0"
    )
    plan = plan_of(config)
    roles = {r.role for r in plan.roles}
    assert "learner" in roles and not roles & {"actors", "teacher", "serve"}


# --- --dry-run ---


def arguments_of(config: Path) -> list[str]:
    """Leaves out the demo's clips, which take half a minute to open; those of the others are not here."""
    if config.name != "demo.yaml":
        return ["--config", str(config)]
    return [f"data.{s}.{k}=nowhere" for s in ("train", "eval") for k in ("annotations", "lengths", "videos")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_dry_run_of_every_config_needs_no_weights_data_or_gpu(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = launch.main([*arguments_of(config), "--dry-run", "--gpu-memory-gib", "80"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "") and not list(tmp_path.iterdir())
    assert "NOT CHECKED  annotations and videos of data.train" in captured.out
    assert "GiB a process" in captured.out and "billion parameters" in captured.out
    planned = "time      not planned: learner, actors, teacher on CPUs"
    if config.name != "demo.yaml":
        planned = "time, estimated, of an H100"
        assert (
            "NOT CHECKED  student" in captured.out and "the committed copy, configs/shapes/" in captured.out
        )
        assert "NOT CHECKED  tokenizers" in captured.out
    assert planned in captured.out


def test_a_dry_run_warns_of_processes_without_work(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (config,) = (c for c in CONFIGS if c.name == "qwen3vl_8b.yaml")
    assert launch.main([*arguments_of(config), "--dry-run", "rollout.prompts_per_call=32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING   ")]
    assert len(lines) == 1 and "rollout.num_actors=2, but 32 prompts in flight" in lines[0], lines


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.name != "demo.yaml"], ids=lambda p: p.name)
def test_a_launch_refuses_what_a_dry_run_could_not_check(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.json cannot be read" in line and not list(tmp_path.iterdir())


def test_a_dry_run_that_does_not_fit_is_one_line_and_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "qwen3vl_8b.yaml")
    assert launch.main(["--config", config, "--dry-run", "--gpu-memory-gib", "40"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: learner: ") and len(captured.err.strip().splitlines()) == 1
    assert "GiB a process" in captured.out


@pytest.mark.parametrize("gib", ["0", "-1", "nan", "inf"])
def test_a_gpu_must_have_memory(capsys, monkeypatch, tmp_path, gib):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "qwen3vl_8b.yaml")
    assert launch.main(["--config", config, "--dry-run", f"--gpu-memory-gib={gib}"]) == 2
    assert "--gpu-memory-gib" in capsys.readouterr().err


def test_a_mistyped_model_in_a_dry_run_is_one_line_and_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "qwen3vl_8b.yaml")
    assert launch.main(["--config", config, "--dry-run", "student=models/Qwen3-VL-8B-Instrukt"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Qwen3-VL-8B-Instrukt does not exist" in line


def test_one_missing_file_of_a_split_is_a_mistake_even_in_a_dry_run(capsys, split_folder, tmp_path):
    data = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    overrides = [f"data.{s}.{k}={split_folder / v}" for s in ("train", "eval") for k, v in data.items()]
    demo = ["--config", str(ROOT / "configs" / "demo.yaml"), "groups_per_step=3", "max_policy_lag=0"]
    overrides += [
        f"student={ROOT / 'demo/models/student'}",
        f"teacher={ROOT / 'demo/models/teacher'}",
        f"runs_dir={tmp_path}",
    ]
    assert launch.main([*demo, *overrides, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "NOT" not in out and "12 tokens a prompt expected" in out
    assert "longest prompt 101 tokens" in out, "counted"
    assert [p.name for p in tmp_path.iterdir()] == [".videos"], "what the next start needs not open"
    assert launch.main([*demo, *overrides, "data.eval.annotations=nowhere.txt", "--dry-run"]) == 2
    assert "nowhere.txt cannot be read" in capsys.readouterr().err
