"""configs/paper and docs/reproduce.md: they fit, and the document has what the code computes."""

import re
import shlex
from dataclasses import replace

import pytest

import launch
from driver import command_line
from evaluation import __main__ as evaluation
from preflight.inputs import SHAPES, make_draft
from preflight.memory import GIB, workload_of_budget
from preflight.memory_fit import MemoryPlan, check_fits
from preflight.model_shapes import find_shapes
from preflight.time_fit import HOUR_S, describe_time, time_plan, utilisation
from preflight.time_plan import TimePlan
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.datasets import __main__ as datasets

CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
DOC = (ROOT / "docs" / "reproduce.md").read_text()
POOL = 96_586  # prompts of TimeLens-100K, as the paper counts them
BLOCKS = re.findall(r"^```\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
WHOLE = tuple(f"teacher_pool.{k}" for k in ("tensor_parallel=1", "num_replicas=2", "micro_batch=1"))
BASELINE = ("video_opd.yaml", "num_steps=79")
RUNS: dict[str, tuple[str, ...]] = {
    **{f"`{path.name}`": (path.name,) for path in CONFIGS},
    "`video_opd.yaml`, RKD": (*BASELINE, "loss.kind=off_policy_rkd"),
    "`video_opd.yaml`, FKD": (*BASELINE, "loss.kind=off_policy_fkd", *WHOLE),
    "`grpo_teacher.yaml`, 8B": ("grpo_teacher.yaml", "student=models/Qwen3-VL-8B-Instruct"),
}
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")]


def memory_of(config: Config) -> MemoryPlan:
    """On GPUs of 79 GiB: what those "of 80 GB" have."""
    student = find_shapes(config.student, SHAPES)
    teacher = find_shapes(config.teacher, SHAPES) if config.teacher else None
    work = workload_of_budget(config.video, student)
    return MemoryPlan(config, student, teacher, work, work, 79 * GIB, host_bytes=1 << 50)


def time_of(name: str, *overrides: str, device: str = "h100") -> TimePlan:
    """For the pool's number of prompts that fill the video budget."""
    memory = memory_of(load_config(ROOT / "configs" / "paper" / name, overrides))
    plan = time_plan(memory, make_draft(memory.config), device, utilisation(None))
    assert isinstance(plan, TimePlan)
    return replace(plan, train=replace(plan.train, num_prompts=POOL))


def hours_of_steps(plan: TimePlan) -> str:
    (hours,) = re.findall(r"\d+ steps ([\d.]+) h", describe_time(plan))
    return hours


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """Where neither models nor data are."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("label", RUNS)
def test_the_document_has_the_costs_of_every_run(label):
    name, *overrides = RUNS[label]
    plan = time_of(name, *overrides)
    check_fits(plan.memory, one_machine=False)
    config, phases = plan.config, plan.phases
    teachers = config.teacher_pool.num_replicas if plan.memory.teacher else 0
    seconds = [phases[p].seconds if p in phases else 0 for p in ("rollout", "score", "update")]
    passes = {p.name.split()[0]: p.seconds / HOUR_S for p in plan.passes if "evaluation" not in p.name}
    cells = [
        f"{config.learner.world_size}, {config.rollout.num_actors}, {teachers}",
        *(f"{s:.1f}" for s in (*seconds, plan.step_s)),
        hours_of_steps(plan),
        *(f"{passes[who]:.0f}" if who in passes else "" for who in ("teacher", "student")),
    ]
    row = f"| {label} | {' | '.join(cells)} |"
    assert row in DOC, row


def test_the_document_compares_its_plan_with_what_the_papers_measured():
    plan = time_of("video_opd.yaml", "num_steps=79", device="a100")
    assert f"`--device a100` says {hours_of_steps(plan)} h" in DOC
    grpo, opd = (time_of(*RUNS[name]).step_s for name in ("`grpo_teacher.yaml`, 8B", "`video_opd.yaml`"))
    assert f"step takes {grpo:.1f} s, against {opd:.1f} s" in DOC


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_dry_run_of_every_config_needs_no_weights_data_or_gpu(path, capsys):
    code = launch.main(["--config", str(path), "--dry-run", "--gpu-memory-gib", "80"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "") and "time, estimated, of an H100" in captured.out
    assert "WARNING" not in captured.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_document_are_known_and_their_configs_fit(command, capsys):
    words = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
    if "launch.py" in words:
        config = command_line.read_config(command_line.parse_arguments(words[2:]))
        check_fits(memory_of(config), one_machine=False)
    elif "evaluation" in words:
        parsed = evaluation.parse_arguments(words[3:])
        config = evaluation.read_config(parsed)
        assert config and config.student.endswith(str(parsed.model))
        assert evaluation.protocol_named(parsed.protocol).name == "timelens"
    else:
        assert datasets.main(words[3:]) == 2 and "does not exist: check the path" in capsys.readouterr().err


def test_every_line_of_the_papers_config_says_where_it_comes_from():
    lines = (ROOT / "configs" / "paper" / "video_opd.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r" *\w+: *[^ #]", line)]
    silent = [line for line in values if not re.search("# .*(§|App|Table|eq\\.|released|ours)", line)]
    assert len(values) > 40 and silent == SAID_ABOVE


SAID_ABOVE = [  # at the split that they are of
    "    format: timelens_100k",
    "    annotations: data/TimeLens-100K/timelens-100k.jsonl",
    "    videos: data/TimeLens-100K/videos",
    "    format: timelens_bench",
    "    annotations: data/TimeLens-Bench/charades-timelens.json",
    "    videos: data/TimeLens-Bench/videos/charades",
]


def config_of(name: str) -> Config:
    return load_config(ROOT / "configs" / "paper" / name)


def test_the_configs_agree_on_what_the_paper_fixes():
    """Frames, tokens, learning rate, batch and frozen parts (§4.1), whatever else differs."""
    for path in CONFIGS:
        config = config_of(path.name)
        video, learner = config.video, config.learner
        assert (video.fps, video.min_frames, video.max_frames) == (2, 4, 768)
        assert (video.max_video_tokens, video.max_frame_tokens) == (8192, 768)
        assert (learner.lr, learner.warmup_frac) == (1e-6, 0.03)
        assert (learner.zero_stage, learner.dtype) == (3, "bfloat16")
        assert learner.freeze_vision and config.groups_per_step == 32 and config.max_policy_lag == 0
        assert config.rollout.max_model_len == 16000 and config.num_steps in (78, 79, 237)
    released = config_of("released.yaml")
    learner = released.learner
    assert (learner.lr_decay, learner.final_lr_frac, learner.weight_decay) == ("cosine", 0.0, 0.1)
    assert learner.betas == (0.9, 0.95) and released.rollout.temperature == 0.9
    assert released.data.sources[""].format == "video_opd" and released.curriculum.kind == "uniform"
