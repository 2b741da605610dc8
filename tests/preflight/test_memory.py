"""The memory model against published totals and against real tensors, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import launch
from demo.models import Size, build_model, build_tokenizer
from learner.adapters import choose_trained
from learner.loss import ResponseTokens, loss_per_token
from preflight.inputs import SHAPES
from preflight.memory import (
    DTYPE_BYTES,
    GIB,
    ProcessMemory,
    RoleMemory,
    Workload,
    estimate,
    gradient_bytes,
    kv_bytes_per_token,
    learner_memory,
    logit_copies,
    optimizer_bytes,
    text_layer_passing,
    text_layer_saved,
    trained,
    video_bytes,
    vision_block_passing,
    vision_block_saved,
    weight_bytes,
    workload_of_budget,
)
from preflight.memory_fit import MemoryPlan, check_fits, host_total
from preflight.model_shapes import count, find_shapes, parameters, parse_shapes
from tests.live_bytes import LiveBytes
from video_opd import ROOT
from video_opd.config import Config, LearnerConfig, LossConfig, TeacherModel
from video_opd.config_file import load_config
from video_opd.errors import ConfigError, InputError, ModelError
from video_opd.models.forward import ResponseBatch, ResponseLoss, by_chunks, token_entropy

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = {  # parameters, billions
    "Qwen3-VL-2B-Instruct": 2.13,
    "Qwen3-VL-4B-Instruct": 4.44,
    "Qwen3-VL-8B-Instruct": 8.77,
    "Qwen3-VL-32B-Instruct": 33.4,
    "Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen2.5-VL-7B-Instruct": 8.29,
}
SIZE = Size(hidden=128, layers=4, vision_hidden=256, vision_layers=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(SIZE, tokenizer, seed=0)


def shapes_of(model):
    return parse_shapes(model.config.to_dict(), "tiny", "tiny")


def batch_of(
    model, num_videos: int = 2, pairs: int = 8, side: int = 4, text: int = 100, response: int = 20
) -> ResponseBatch:
    """Videos of pairs x side x side tokens with made-up text."""
    ids, types = [5] * 4, [0] * 4
    for _ in range(pairs):
        ids += [
            model.config.vision_start_token_id,
            *[model.config.video_token_id] * side**2,
            model.config.vision_end_token_id,
        ]
        types += [0, *[2] * side**2, 0]
    ids, types = ids + [7] * (text + response), types + [0] * (text + response)
    rows = torch.cat(
        [torch.arange(len(ids) - response - 1, len(ids) - 1) + i * len(ids) for i in range(num_videos)]
    )
    return ResponseBatch(
        input_ids=torch.tensor([ids] * num_videos),
        attention_mask=torch.ones(num_videos, len(ids), dtype=torch.int64),
        token_types=torch.tensor([types] * num_videos),
        pixel_values=torch.randn(num_videos * pairs * side**2 * 4, 1536),
        video_grid_thw=torch.tensor([[pairs, 2 * side, 2 * side]] * num_videos),
        rows=rows,
        targets=torch.zeros(num_videos * response, dtype=torch.int64),
        lengths=(response,) * num_videos,
    )


# --- shapes ---


def test_shapes_are_committed_for_every_published_model():
    assert {p.stem for p in SHAPES.glob("*.json")} == PUBLISHED.keys()


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_committed_shapes_have_the_published_number_of_parameters(name, billions):
    shapes = find_shapes(f"/nowhere/{name}", SHAPES)
    assert shapes.committed and count(parameters(shapes)) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_the_one_that_transformers_makes(name, tmp_path):
    """The same names and shapes, at two layers of each tower; the others repeat them."""
    tree = json.loads((SHAPES / f"{name}.json").read_text())
    tree["text_config"]["num_hidden_layers"] = tree["vision_config"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with torch.device("meta"):
        real = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert parameters(find_shapes(tmp_path, SHAPES)) == {
        n: tuple(p.shape) for n, p in real.named_parameters()
    }


def test_an_unknown_model_that_is_not_here_is_one_line():
    with pytest.raises(
        ModelError, match=r"/nowhere/Qwen3-VL-8B-Instrukt does not exist, and shapes are known of Qwen2"
    ) as caught:
        find_shapes("/nowhere/Qwen3-VL-8B-Instrukt", SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"vision_config": None}, {"text_config": {}}])
def test_a_damaged_config_is_named(tmp_path, change):
    tree = json.loads((SHAPES / "Qwen3-VL-2B-Instruct.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"config\.json"):
        find_shapes(tmp_path, SHAPES)


# --- exact formulas ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_vision": False},
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_targets": r".*\.attn\.(qkv|proj)"},
    ],
)
def test_what_is_trained_is_what_the_learner_trains(model, options):
    learner = LearnerConfig(**options)
    if "lora_targets" in options:
        learner = learner.model_copy(update={"freeze_vision": False})
    shapes = shapes_of(model)
    choose_trained(model, learner)
    assert count(trained(shapes, learner)) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_parameter_bytes_are_exact(model, dtype):
    model = model.to(getattr(torch, dtype))
    learner = LearnerConfig(dtype=dtype, zero_stage=0)
    assert weight_bytes(shapes_of(model), learner) == {"weights": sum(p.nbytes for p in model.parameters())}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@torch.no_grad()
def test_kv_bytes_per_token_are_exact(model, dtype):
    model, cache = model.to(getattr(torch, dtype)), DynamicCache()
    model(input_ids=torch.tensor([[5] * 37]), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert held == 37 * kv_bytes_per_token(shapes_of(model), dtype)


def test_adam_keeps_the_bytes_that_are_planned_for(model):
    learner = LearnerConfig(dtype="float32", zero_stage=0, freeze_vision=True)
    shapes = shapes_of(model)
    choose_trained(model, learner)
    parameters_ = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters_)
    for parameter in parameters_:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    planned = optimizer_bytes(count(trained(shapes, learner)), learner)
    assert planned == {"optimizer moments": moments, "float32 masters": 0}
    assert gradient_bytes(count(trained(shapes, learner)), learner) == {
        "gradients": sum(p.nbytes for p in parameters_)
    }


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 4), (2, 4), (3, 4)])
def test_zero_stages_divide_what_they_partition(stage, ranks):
    shapes = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)
    learner = LearnerConfig(zero_stage=stage, world_size=ranks, freeze_vision=False)
    n = count(parameters(shapes))
    assert optimizer_bytes(n, learner) == {
        "optimizer moments": 8 * n // ranks,
        "float32 masters": 4 * n // ranks,
    }
    assert gradient_bytes(n, learner)["gradients"] == 2 * n // (ranks if stage >= 2 else 1)
    assert weight_bytes(shapes, learner)["weights"] == 2 * n // (ranks if stage == 3 else 1)


# --- activations, against the tensors of real passes ---


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_what_layers_keep_for_the_backward_pass(model, dtype):
    model, e = model.to(getattr(torch, dtype)).train(), DTYPE_BYTES[dtype]
    shapes, batch = shapes_of(model), batch_of(model)
    with LiveBytes() as live:
        result = ResponseLoss(model, 512)(
            batch, lambda logits, _: (logits.logsumexp(-1),), len(batch.targets)
        )
        kept = live.now
    del result
    layers = batch.input_ids.numel() * SIZE.layers * text_layer_saved(shapes, e)
    blocks = len(batch.pixel_values) * SIZE.vision_layers * vision_block_saved(shapes, e)
    assert kept == pytest.approx(layers + blocks, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_learners_pass(tokenizer, dtype, checkpointing):
    """Forward and backward beside whole gradients, as from an update's second micro-batch on."""
    size = Size(hidden=128, layers=8, vision_hidden=64)
    model = build_model(size, tokenizer, seed=0).to(getattr(torch, dtype)).train()
    shapes, batch = shapes_of(model), batch_of(model, text=400)
    learner = LearnerConfig(
        dtype=dtype, gradient_checkpointing=checkpointing, zero_stage=0, num_gpus=0, micro_batch=2
    )
    choose_trained(model, learner)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as live:
        loss, *_ = ResponseLoss(model, 512)(
            batch, lambda logits, _: (logits.logsumexp(-1),), len(batch.targets)
        )
        loss.sum().backward()
    config = config_of("demo.yaml").model_copy(
        update={
            "learner": learner,
            "rollout": config_of("demo.yaml").rollout.model_copy(
                update={"max_model_len": 16000, "max_response_tokens": 20}
            ),
        }
    )
    work = Workload(
        mean_video_tokens=128,
        max_video_tokens=128,
        max_prompt_tokens=batch.input_ids.shape[1] - 20,
        clip_bytes=0,
    )
    phases = learner_memory(config, shapes, None, work).host.phases
    planned = max(sum(phases[p].values()) - phases[p]["pixels"] for p in ("loss", "backward"))
    assert live.peak == pytest.approx(planned, rel=0.25)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@torch.no_grad()
def test_the_peak_of_passes_that_keep_nothing(model, dtype):
    model, e = model.to(getattr(torch, dtype)), DTYPE_BYTES[dtype]
    shapes, batch = shapes_of(model), batch_of(model)
    pixels = batch.pixel_values.to(getattr(torch, dtype))
    with LiveBytes() as live:
        model.model.get_video_features(pixels, batch.video_grid_thw)
    features = video_bytes(shapes, e, len(pixels) // 4)["video features"]
    assert live.peak - features == pytest.approx(len(pixels) * vision_block_passing(shapes, e), rel=0.15)
    embeddings = torch.randn(2, 512, SIZE.hidden, dtype=pixels.dtype)
    with LiveBytes() as live:
        model.model.language_model(
            inputs_embeds=embeddings, use_cache=False, position_ids=torch.arange(512).expand(3, 2, 512)
        )
    assert live.peak + embeddings.nbytes == pytest.approx(1024 * text_layer_passing(shapes, e), rel=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kind=k)
        for k in ("opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft")
    ]
    + [LossConfig(kind="opd_full", divergence="jsd")],
    ids=lambda loss: f"{loss.kind}-{loss.divergence}",
)
@pytest.mark.parametrize("chunk", [64, 16])
def test_copies_of_the_logits_at_the_peak_of_every_loss(loss, chunk):
    rows, vocabulary, hidden = 64, 20_000, 16
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    tokens = ResponseTokens(
        targets=torch.zeros(rows, dtype=torch.int64),
        actor_logprobs=torch.zeros(rows),
        advantage=torch.ones(rows),
        top_k=(torch.arange(32).expand(rows, 32), torch.full((rows, 32), -5.0)),
        teacher_logprobs=torch.zeros(rows),
        teacher_logits=lambda which: torch.zeros(rows, hidden)[which] @ head.weight.detach().T,
    )

    def of_rows(logits: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
        return *loss_per_token(loss, logits, tokens, which), token_entropy(logits.detach())

    with LiveBytes() as live:
        by_chunks(head, torch.randn(rows, hidden, requires_grad=True), of_rows, chunk, rows)[
            0
        ].sum().backward()
    most = 4 * chunk * vocabulary * logit_copies(loss)
    gradient_of_head = head.weight.nbytes
    assert live.peak <= 1.02 * most + gradient_of_head
    assert live.peak >= 0.98 * most or chunk < rows  # of several chunks, the recomputation leaves some out


# --- what fits ---


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
        (["learner.zero_stage=1"], 62, "learner.zero_stage=2 would need"),
        (["learner.micro_batch=8"], 70, "learner.micro_batch=4 would need"),
        (["learner.world_size=2"], 60, "learner.world_size=4 would need"),
        (["learner.world_size=1", "learner.zero_stage=0"], 48, "learner.lora_rank=16 would need"),
        (["curriculum.num_teacher_predictions=4"], 80, "curriculum.num_teacher_predictions=2 would need"),
        (["rollout.gpu_memory_utilization=1.0"], 80, "rollout.gpu_memory_utilization=0.95 would need"),
        (["rollout.num_gpus=0.5"], 80, "rollout.gpu_memory_utilization=0.45 would need"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_smallest_change_that_would(overrides, gpu_gib, named):
    message = refusal(plan_of(config_of("qwen3vl_8b.yaml", *overrides), gpu_gib))
    assert named in message, message


def test_a_teacher_in_parts_has_a_share_of_the_weights_in_each():
    def teacher(*overrides: str) -> RoleMemory:
        roles = plan_of(config_of("qwen3vl_8b.yaml", "teacher_pool.engine=vllm", *overrides)).roles
        return next(r for r in roles if r.role == "teacher")

    whole, parts = teacher(), teacher("teacher_pool.tensor_parallel=4")
    assert whole.device and parts.device
    assert parts.processes == 4 * whole.processes
    assert parts.device.held["weights"] == whole.device.held["weights"] // 4
    assert parts.device.held["KV cache"] > whole.device.held["KV cache"]  # what the weights leave


def test_of_several_teachers_each_has_its_replicas():
    config = config_of("qwen3vl_8b.yaml")
    several = tuple(TeacherModel(name=name, model="models/Qwen3-VL-32B-Instruct") for name in ("a", "b"))
    roles = plan_of(config).of(config.model_copy(update={"teachers": several, "teacher": None}))
    assert {r.role: r.processes for r in roles}["teacher"] == 2 * config.teacher_pool.num_replicas


def test_the_named_change_does_fit_and_the_next_larger_value_does_not():
    message = refusal(plan_of(config_of("qwen3vl_8b.yaml", "learner.micro_batch=16"), 70))
    assert "learner.micro_batch=4 would need 67" in message
    learner, *_ = plan_of(config_of("qwen3vl_8b.yaml", "learner.micro_batch=4"), 70).roles
    assert learner.device and round(learner.device.peak_bytes / GIB) == 67
    learner, *_ = plan_of(config_of("qwen3vl_8b.yaml", "learner.micro_batch=8"), 70).roles
    assert learner.device and learner.device.peak_bytes > 70 * GIB


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
    roles = {
        r.role
        for r in estimate(config, plan.student, plan.teacher, plan.train, plan.evaluation, plan.gpu_bytes)
    }
    assert "learner" in roles and not roles & {"actors", "teacher", "serve"}


# --- --dry-run ---


def arguments_of(config: Path) -> list[str]:
    """The demo's clips are left out, since it takes half a minute to open them; those of the others are not here."""
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
    if config.name != "demo.yaml":
        assert (
            "NOT CHECKED  student" in captured.out and "the committed copy, configs/shapes/" in captured.out
        )
        assert "NOT CHECKED  tokenizers" in captured.out


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


def test_one_missing_file_of_a_split_is_a_mistake_even_in_a_dry_run(capsys, split_folder):
    data = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    overrides = [f"data.{s}.{k}={split_folder / v}" for s in ("train", "eval") for k, v in data.items()]
    demo = ["--config", str(ROOT / "configs" / "demo.yaml"), "groups_per_step=3", "max_policy_lag=0"]
    overrides += [
        f"student={ROOT / 'demo/models/student'}",
        f"teacher={ROOT / 'demo/models/teacher'}",
    ]
    assert launch.main([*demo, *overrides, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "NOT" not in out and "12 tokens a prompt expected" in out
    assert launch.main([*demo, *overrides, "data.eval.annotations=nowhere.txt", "--dry-run"]) == 2
    assert "nowhere.txt cannot be read" in capsys.readouterr().err
