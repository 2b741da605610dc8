"""The plan of seconds: phases, overlap, passes, the split of the GPUs, and its words."""

import math
from dataclasses import replace

import numpy as np
import pytest

import launch
from preflight import time
from preflight.devices import DEVICES, Utilisation, device_name
from preflight.gpus import Gpu, Machine
from preflight.inputs import SHAPES
from preflight.memory import GIB, workload_of_budget
from preflight.memory_fit import MemoryPlan
from preflight.model_shapes import find_shapes
from preflight.pools import Pool, pool_of
from preflight.time_fit import describe_time, faster_split, splits
from preflight.time_plan import Phase, TimePlan
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.datasets import Split
from video_opd.types import Clip, Prompt

GRID, TOKENS = (32, 32, 32), 8300  # 8,192 video tokens, as the paper's run
PAPER = "qwen3vl_8b.yaml"
STUDENT = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)


def plan_of(
    *overrides: str, config: str = PAPER, gpu_gib: int = 80, device: str = "h100", **of_pool
) -> TimePlan:
    """The plan of a config for prompts of TOKENS tokens."""
    made = load_config(ROOT / "configs" / config, overrides)
    student = find_shapes(made.student, SHAPES)
    teacher = find_shapes(made.teacher, SHAPES) if made.needs_teacher and made.teacher else None
    work = workload_of_budget(made.video, student)
    memory = MemoryPlan(made, student, teacher, work, work, gpu_gib * GIB, 1 << 50)
    of_teacher = time.size_of(teacher, GRID, TOKENS) if teacher else None
    pool = Pool(time.size_of(student, GRID, TOKENS), of_teacher, **of_pool)
    kv_caches = {"actors": 40 * GIB, "teacher": math.inf}
    return TimePlan(made, memory, device, DEVICES[device], Utilisation(), pool, pool, kv_caches)


def seconds_of(plan: TimePlan) -> dict[str, float]:
    return {name: phase.unit_s for name, phase in plan.phases.items()}


def test_the_papers_run_by_hand():
    """Qwen3-VL-8B: 36 layers of 4096, an MLP of 12288, 8 of 32 heads with keys; 27 blocks of 1152."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    text = 2 * 8300 * 36 * layer + 2 * 36 * 4096 * 8300**2  # half of the pairs, 4Q operations each
    block, merger = 4 * 1152**2 + 2 * 1152 * 4304, 4608 * 4608 + 4608 * 4096
    tower = 2 * 32768 * (27 * block + 3 * 2 * 16 * 16 * 1152) + 2 * 8192 * 4 * merger
    tower += 27 * 4 * 1152 * 32 * 1024**2
    head = 2 * 4096 * 151936
    prefill_s = (text + tower + head) / (0.5 * 989e12)
    (rollout,) = (p for p in plan_of().phases.values() if p.name == "rollout")
    assert rollout.terms["prefill"] == pytest.approx(prefill_s, rel=1e-6)
    assert prefill_s == pytest.approx(0.343, abs=0.001)


def test_the_papers_run_on_h100s():
    """Seconds of a prompt in each actor and replica, of a response in each rank."""
    plan = plan_of()
    found = {name: round(seconds, 2) for name, seconds in seconds_of(plan).items()}
    assert found == {"rollout": 0.41, "score": 1.27, "update": 1.62, "publish": 0.13}
    assert {p.name: p.num_units for p in plan.phases.values()} == {
        "rollout": 16,
        "score": 16,
        "update": 8,
        "publish": 1,
    }
    assert (round(plan.step_s, 1), round(plan.at_lag(1).step_s, 1)) == (35.2, 20.4)
    text = (ROOT / "docs" / "hardware.md").read_text()
    shown = [line for line in describe_time(plan).splitlines() if line[2:9] not in ("prompts", "passes ")]
    assert all(line in text for line in shown), shown


BY_VIDEO = "curriculum.group_by_video=true", "curriculum.select_by=video"
GRPO = "loss.kind=grpo", "curriculum.kind=uniform", "rollout.rollouts_per_prompt=8"
ACTIVITYNET = {"num_prompts": 37421, "prompts_a_video": 37421 / 10009}


def test_what_sharing_saves_of_the_papers_run():
    """The table of docs/hardware.md. micro_batch=1 shares nothing in the learner, whose part is rollouts'."""
    plans = {
        "one query a clip": plan_of(),
        "3.7 queries a clip, apart": plan_of(**ACTIVITYNET),
        "3.7 queries a clip, together": plan_of(*BY_VIDEO, **ACTIVITYNET),
        "`grpo`, 8 rollouts, apart": plan_of(*GRPO, "learner.micro_batch=1"),
        "`grpo`, 8 rollouts, together": plan_of(*GRPO),
    }
    text = (ROOT / "docs" / "hardware.md").read_text()
    for name, plan in plans.items():
        seconds = [plan.phases[p].seconds if p in plan.phases else 0 for p in ("rollout", "score", "update")]
        cells = [f"{s:.1f}" for s in (*seconds, plan.at_lag(0).step_s, plan.at_lag(1).step_s)]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_decoding_reads_weights_once_a_batch_and_the_keys_and_values_of_every_response():
    size = time.size_of(STUDENT, GRID, 1000)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    norms = 2 * 4096 + 2 * 128
    weights = 2 * (36 * (layer + norms) + 4096 * 151936)
    a_token = 2 * 36 * 8 * 128 * 2  # a key and a value of 8 heads in every layer
    by_hand = 64 * (3 * weights + 10 * (1000 + 32) * a_token)  # ten responses, four at once
    assert time.decode_bytes(STUDENT, "bfloat16", 1, size, (10, 64), 4) == by_hand
    halves = 64 * (3 * weights / 2 + 10 * (1000 + 32) * a_token / 2)
    assert time.decode_bytes(STUDENT, "bfloat16", 2, size, (10, 64), 4) == halves


@pytest.mark.parametrize(
    ("parts", "lag", "seconds"), [(1, 0, 9), (1, 1, 4.5), (4, 0, 7.5), (4, 1, 4)], ids=str
)
def test_phases_overlap_as_measured_in_docs_performance(parts, lag, seconds, monkeypatch):
    """Rollouts of 4 s, scores of 2 s and an update of 3 s took 9.05, 4.53, 7.54 and 3.96 s."""
    phases = {
        "rollout": Phase("rollout", 1, "prompt", 8, {"prefill": 0.5}),
        "score": Phase("score", 1, "prompt", 8, {"prefill": 0.25}),
        "update": Phase("update", 1, "response", 8, {"forward and backward": 0.375}),
    }
    monkeypatch.setattr(TimePlan, "phases", phases)
    plan = plan_of(f"max_policy_lag={lag}", f"rollout.prompts_per_result={8 // parts}")
    assert plan.step_s == seconds


def test_on_one_shared_gpu_roles_take_turns_whatever_the_lag():
    plan = plan_of(config="qwen3vl_2b_1gpu.yaml")
    phases = plan.phases.values()
    assert plan.at_lag(1).step_s >= sum(p.num_units * sum(p.terms.values()) for p in phases)
    assert "take turns" in describe_time(plan) and "GPUs are shared" in describe_time(plan)


def test_a_role_whose_cpus_are_slower_than_its_gpu_waits_for_them():
    slow, fast = (plan_of(f"rollout.num_cpus={n}", megapixels=2000.0) for n in (1, 8))
    assert slow.phases["rollout"].waits_for_feed and not fast.phases["rollout"].waits_for_feed
    assert slow.phases["rollout"].seconds == pytest.approx(16 * (2.0 + 8300 * 4.8e-5))
    assert "raise num_cpus" in describe_time(slow) and "raise num_cpus" not in describe_time(fast)


def test_adapters_and_a_frozen_tower_cost_less_and_chunks_of_the_head_more():
    def compute(*overrides: str) -> float:
        return plan_of(*overrides).phases["update"].terms["forward and backward"]

    plain = compute()
    assert compute("learner.freeze_vision=false") > 1.1 * plain
    assert compute("learner.lora_rank=16") < 0.9 * plain
    assert compute("learner.gradient_checkpointing=false") < 0.85 * plain
    assert compute("learner.logit_rows=8") > plain
    assert compute("learner.attn_implementation=eager") > 1.1 * plain
    assert compute("learner.micro_batch=1") == plain, "different clips share nothing, and are not padded"


def test_links_hold_up_a_learner_only_where_they_are_slow():
    waits = {name: plan_of(device=name).phases["update"].terms["waits for links"] for name in DEVICES}
    assert waits["h100"] == 0
    many = plan_of("learner.world_size=16", device="l40s").phases["update"]
    assert many.terms["waits for links"] == 0, "its matrices are slow too"
    stage_2 = plan_of("learner.zero_stage=2").phases["update"].terms["waits for links"]
    gradients = 2 * 8.19e9  # without the tower
    assert stage_2 == pytest.approx(0.75 * gradients / (0.6 * 450e9), rel=0.01), "they do not overlap"
    offload = 'learner.deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'
    on_host = plan_of(offload, "learner.num_cpus=16").phases["update"].once["optimizer"]
    assert on_host == pytest.approx(30 * 8.19e9 / 4 / (16 * 5e9), rel=0.01)


def test_a_publication_by_each_way():
    def terms(*overrides: str) -> dict[str, float]:
        of = plan_of(*overrides).phases["publish"].terms
        return {name: round(seconds, 2) for name, seconds in of.items()}

    assert terms() == {"gather": 0.06, "broadcast": 0.06}, "17.5 GB over 0.6 of 450 GB/s"
    assert terms("learner.zero_stage=2") == {"broadcast": 0.06}
    store = "learner.weight_transfer=object_store"
    assert terms(store) == {"gather": 0.06, "PCIe": 0.91, "object store": 3.51}
    assert sum(terms("learner.lora_rank=16").values()) < 0.1, "adapters alone"
    shares = ("learner.num_gpus=0.7", "rollout.num_gpus=0.2", "rollout.gpu_memory_utilization=0.15")
    assert terms("learner.weight_transfer=ipc", "learner.zero_stage=2", *shares) == {"copy": 0.01}


@pytest.mark.parametrize(("device", "faster"), [("a100", 1), ("h100", 2)])
def test_fp8_is_faster_where_the_gpu_computes_in_it(device, faster):
    models = ("Qwen3-VL-32B-Instruct", "Qwen3-VL-32B-Instruct-FP8")
    bf16, fp8 = (
        plan_of(f"teacher=models/{m}", "teacher_pool.engine=vllm", device=device).phases["score"].unit_s
        for m in models
    )
    assert bf16 / fp8 == pytest.approx(faster, rel=0.01)


def test_a_phase_of_no_time_has_no_empty_brackets():
    assert "()" not in describe_time(plan_of(config="qwen3vl_2b_1gpu.yaml"))


# --- passes ---


def test_the_passes_over_the_pools():
    plan = plan_of(num_prompts=12408, prompts_a_video=2.3)
    told = {p.name: (p.times, p.num_prompts) for p in plan.passes}
    assert told == {
        "teacher (TRPV)": (1, 12408),
        "student (DBTP)": (3, 12408),
        "evaluation": (3, 12408),
        "teacher's evaluation": (1, 12408),
    }
    passes = sum(p.times * p.seconds for p in plan.passes)
    assert plan.run_s == pytest.approx(3 * 2500 / 32 * plan.step_s + passes), (
        "79 steps a round, the last of 4"
    )
    assert f"passes {passes / 3600:.1f} h" in describe_time(plan)
    first, *_ = plan.passes
    number = plan.config.curriculum.num_teacher_predictions
    assert first.seconds == pytest.approx(plan.teacher_answers_s(plan.train, 12408, number) / 3), (
        "learner's GPUs too"
    )
    sampled = plan_of("curriculum.pool_sample=3000", num_prompts=12408).passes
    assert [p.num_prompts for p in sampled] == [3000, 6000, 3000, 12408, 12408], "three rounds, three samples"
    without_help = plan.teacher_answers_s(plan_of(num_prompts=12408).train, 6000, number)
    assert sampled[1].seconds == pytest.approx(without_help), "the learner has started"
    larger = plan_of("curriculum.pool_sample=6000", num_prompts=12408).passes
    assert [p.num_prompts for p in larger] == [6000, 6408, 6000, 12408, 12408], "never more than the pool"
    every = plan_of("eval_every=100", num_prompts=1)
    assert {p.name: p.times for p in every.passes}["evaluation"] == 5, (
        "before, 100, 200, after, without video"
    )
    assert not plan_of("loss={kind: sft}", "curriculum.kind=uniform", "rollout.num_actors=0").passes


def test_the_steps_of_a_schedule_take_the_time_of_their_prompts():
    """SCC's: 1,004 presentations in 79 steps (arXiv 2609.40055); whole steps would be 2,528."""
    scc = ("curriculum.kind=scc", "curriculum.num_selected=1000", "num_steps=79")
    plan, whole = plan_of(*scc), plan_of(*scc, "curriculum.scc.schedule=false")
    assert plan.steps_s == pytest.approx(1004 / 32 * plan.step_s)
    assert whole.steps_s == pytest.approx(79 * plan.step_s)
    assert plan_of("num_steps=100").steps_s == pytest.approx((2500 + 21 * 32) / 32 * plan.step_s)


def test_a_student_of_four_answers_decodes_four_times_and_computes_its_prompts_once():
    plan, shapes = plan_of(num_prompts=1000), STUDENT
    one, four = (plan.student_answers_s(plan.train, 1000, number) for number in (1, 4))
    size, rollout = plan.train.student, plan.config.rollout
    bandwidth = 3.35e12 * 0.6
    reads = [time.decode_bytes(shapes, "bfloat16", 1, size, (n, 64), 34) / bandwidth for n in (500, 2000)]
    assert rollout.num_actors == 2 and four - one == pytest.approx(reads[1] - reads[0], rel=0.05)
    assert next(p for p in plan.passes if p.name == "student (DBTP)").seconds == four, "the default"


def test_a_pass_of_scored_rollouts_takes_as_long_as_the_slower_of_both_roles():
    plan = plan_of("curriculum.disagreement=reverse_kl", "curriculum.trpv=false", num_prompts=12408)
    told = {p.name: (p.times, p.num_prompts, p.seconds) for p in plan.passes}
    rollouts, scores = plan.student_answers_s(plan.train, 12408), plan.teacher_scores_s(plan.train, 12408)
    assert told["scored rollouts (DBTP)"] == (3, 12408, max(rollouts, scores)) and scores > rollouts
    assert not {"teacher (TRPV)", "student (DBTP)"} & told.keys(), "the teacher gives no answers"
    assert scores == pytest.approx(12408 / 2 * plan.phases["score"].unit_s), "as in a step"
    shares = ("learner.num_gpus=0.3", "rollout.num_gpus=0.3", "teacher_pool.num_gpus=0.3")
    shared = plan_of("curriculum.disagreement=reverse_kl", *shares)
    both = shared.student_answers_s(shared.train, 10) + shared.teacher_scores_s(shared.train, 10)
    assert shared.scored_rollouts_s(shared.train, 10) == both, "in turns"
    grpo = plan_of(
        "loss.kind=grpo",
        "curriculum.kind=difficulty",
        "rollout.rollouts_per_prompt=8",
        "teacher=null",
        num_prompts=12408,
    )
    assert {p.name: p.times for p in grpo.passes} == {"student": 1, "evaluation": 3}


def test_prompts_of_one_video_share_its_tower_and_their_prefix():
    def student_s(*overrides: str, prompts_a_video: float) -> float:
        plan = plan_of(*overrides, prompts_a_video=prompts_a_video)
        return plan.student_answers_s(plan.train, 1200)

    alone = student_s(prompts_a_video=1)
    shared = student_s("prompt.video_first=true", prompts_a_video=3)
    tower_only = student_s("prompt.video_first=false", prompts_a_video=3)
    assert shared < 0.55 * alone and shared < tower_only < 0.9 * alone


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_prompt_is_computed_once_for_all_answers_and_a_clip_once_in_a_pass(engine):
    def teacher_s(number: int = 1, micro_batch: int = 16, prompts_a_video: float = 1, *more: str) -> float:
        sizes = f"teacher_pool.engine={engine}", f"teacher_pool.micro_batch={micro_batch}"
        plan = plan_of(*sizes, *more, prompts_a_video=prompts_a_video)
        return plan.teacher_answers_s(plan.train, 1000, number)

    assert teacher_s(2) == pytest.approx(teacher_s(), rel=0.2)
    alone, last = teacher_s(), "prompt.video_first=false"
    assert teacher_s(1, 16, 4) < 0.4 * alone
    assert teacher_s(1, 16, 4) < teacher_s(1, 16, 4, last) < 0.98 * alone, "the tower alone"
    saved_by_pairs, saved = (teacher_s(1, n) - teacher_s(1, n, 4) for n in (2, 16))
    assert saved_by_pairs / saved == pytest.approx(2 / 3 if engine == "transformers" else 1, abs=0.02), (
        "vLLM's caches outlast a pass"
    )


def test_a_pool_is_that_of_the_splits_prompts():
    def prompt(number: int, pairs: int) -> Prompt:
        sizes = {
            "frame_indices": np.arange(2 * pairs),
            "frame_size": (64, 96),
            "decode_megapixels": 10.0 * pairs,
        }
        video = {"video_path": f"/{pairs}.mp4", "num_video_frames": 99, "video_fps": 2.0, "duration_s": 9.0}
        clip = Clip(clip_id=str(pairs), **video, **sizes)
        return Prompt(prompt_id=str(number), clip=clip, query="", answer_spans_s=None)

    split = Split([prompt(1, 3), prompt(2, 3), prompt(3, 6)], "key")
    plan = plan_of()
    pool = pool_of(split, plan.memory.train, plan.config, STUDENT, None)
    assert (pool.num_prompts, pool.prompts_a_video, pool.megapixels) == (3, 1.5, 45.0)
    tokens = [pairs * (2 * 3 + 11) + 128 for pairs in (3, 3, 6)]
    assert pool.student.tokens == sum(tokens) / 3 and pool.student.squared == sum(n * n for n in tokens) / 3
    assert pool.student.patches == 4 * 6 * 4 and pool.student.pairs == 4 * 24**2
    counted = replace(plan.memory.train, max_prompt_tokens=100, longest_is_counted=True)
    assert pool_of(split, counted, plan.config, STUDENT, None).student.tokens == 100, "the longest has 100"


# --- the split of the GPUs ---


def test_the_gpus_go_to_the_slowest_phase_and_only_as_memory_allows():
    plan = plan_of("max_policy_lag=1")
    best = faster_split(plan)
    assert best and best.step_s < plan.step_s
    learner, rollout, pool = best.config.learner, best.config.rollout, best.config.teacher_pool
    assert (learner.world_size, rollout.num_actors, pool.num_replicas) == (4, 1, 3)
    gpus = {c.learner.world_size + c.rollout.num_actors + c.teacher_pool.num_replicas for c in splits(plan)}
    assert gpus == {8}
    tight = replace(plan, memory=replace(plan.memory, gpu_bytes=60 * GIB))
    assert faster_split(tight) is None, "a 32B teacher does not fit"
    assert faster_split(best) is None, "nothing is better than the best"
    known = plan_of("max_policy_lag=1", num_prompts=100)
    assert f"{known.run_s / 3600:.1f}" in describe_time(known).splitlines()[-1], (
        "passes count where they are known"
    )


def test_shards_stay_as_they_are_when_the_gpus_are_shared_out():
    plan = plan_of(config="qwen3vl_32b.yaml")
    for config in splits(plan):
        shards = config.rollout.num_actors * config.rollout.tensor_parallel
        assert config.rollout.tensor_parallel == plan.config.rollout.tensor_parallel
        assert config.learner.world_size + shards + config.teacher_pool.num_replicas == 8


# --- words ---


@pytest.mark.parametrize(
    "kind", ["opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft"]
)
@pytest.mark.parametrize("curriculum", ["uniform", "tvdf"])
def test_every_objective_has_a_plan_of_finite_seconds(kind, curriculum):
    plan = plan_of(f"loss.kind={kind}", "rollout.rollouts_per_prompt=2", f"curriculum.kind={curriculum}")
    words = describe_time(plan)
    assert plan.phases["update"].seconds > 0 and 0 < plan.step_s < math.inf
    assert all(phase.seconds > 0 for phase in plan.phases.values())
    assert "nan" not in words and "inf" not in words and all(len(line) < 220 for line in words.splitlines())
    assert ("score" in plan.phases) == (plan.config.loss.needs.teacher != "none")
    assert ("rollout" in plan.phases) == plan.config.loss.needs.rollouts


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_its_own_name(name, key):
    assert device_name(name) == key


def time_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(out) if line.startswith("time"))
    return [out[first], *(line for line in out[first + 1 : first + 10] if line.startswith("  "))]


def dry_run(*arguments: str) -> int:
    return launch.main(["--config", str(ROOT / "configs" / PAPER), "--dry-run", *arguments])


def test_a_dry_run_plans_for_the_machines_gpu_or_the_one_that_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def machine(name: str) -> Machine:
        return Machine((Gpu(name, 80 * GIB, "580.1", 9.0),), 13000, "13.0")

    for module in ("time_fit", "memory_fit", "dry_run"):
        monkeypatch.setattr(f"preflight.{module}.read_machine", lambda: machine("NVIDIA H200"))
    assert dry_run() == 0
    first, *lines = time_lines(capsys)
    assert first.startswith("time, estimated, of an H200 at 50% of its FLOP/s")
    names = [line.split()[0] for line in lines]
    assert names == ["prompts", "rollout", "score", "update", "publish", "step", "passes", "run", "split"]
    assert dry_run("--device", "a100", "--utilisation", "0.4", "0.3", "0.5") == 0
    assert time_lines(capsys)[0].startswith(
        "time, estimated, of an A100 at 40% of its FLOP/s in prefills, 30%"
    )
    monkeypatch.setattr("preflight.time_fit.read_machine", lambda: machine("NVIDIA B200"))
    assert dry_run() == 0
    unknown = (
        "time      not planned: NVIDIA B200 is not in the table of GPUs; plan for one: --device a100, h100"
    )
    assert time_lines(capsys)[0].startswith(unknown)


def test_a_role_on_cpus_has_no_plan_of_time(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dry_run("teacher_pool.num_gpus=0", "teacher_pool.dtype=float32") == 0
    assert time_lines(capsys) == ["time      not planned: teacher on CPUs"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dry-run", "--device", "b200"), "invalid choice: 'b200'"),
        (("--dry-run", "--utilisation", "0.5", "nan", "0.5"), "--utilisation 0.5 nan 0.5: give three shares"),
        (("--dry-run", "--utilisation", "0.5", "0", "0.5"), "--utilisation 0.5 0 0.5: give three shares"),
        (("--device", "h100"), "--device and --utilisation are for the plan that --dry-run prints"),
    ],
)
def test_a_wrong_device_or_share_is_one_line_and_code_2(arguments, told, capsys):
    assert launch.main(["--config", str(ROOT / "configs" / PAPER), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_grey_frames_are_a_second_pass_of_the_teacher_for_what_is_trained_on_alone():
    plain, twice = plan_of(), plan_of("loss.visual_weight=0.5")
    for name, phase in plain.phases.items():
        factor = 2 if name == "score" else 1
        assert sum(twice.phases[name].terms.values()) == pytest.approx(factor * sum(phase.terms.values()))
        assert twice.phases[name].feed == pytest.approx(factor * phase.feed)
    passes = [plan.teacher_scores_s(plain.train, 100) for plan in (plain, twice)]
    assert passes[1] == passes[0], "a selection scores the video alone"
