"""The real command, shrunk: every part real, on tiny models and clips; and what it says of bad input."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import launch
from preflight.inputs import make_plan
from tests.real.conftest import DEMO, reference_logprobs
from tests.real.runs import GROUPS, PATIENCE_S, SHRUNK, metrics_of, run_launch, trajectories_of, write_data
from tests.videos import write_audio
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.datasets import read_prompts
from video_opd.files.checkpoint import check_whole, checkpoint_steps
from video_opd.models.forward import load_model

pytestmark = pytest.mark.usefixtures("shared_ray")
STEPS = 4
BREAKING = """
import launch, pathlib, sys
start = launch.start_ray
def broken(*arguments):
    path = pathlib.Path({path!r})
    path.write_bytes(path.read_bytes()[:1000])
    start(*arguments)
launch.start_ray = broken
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def broken_clips(tmp_path_factory) -> tuple[list[str], dict[str, Path]]:
    """Overrides of a split in which one clip in five is broken, each in another way; and those clips."""
    folder = tmp_path_factory.mktemp("broken")
    data = write_data(folder, "train", 25, ("colour",))
    paths = {f"train{n:05d}": folder / "train" / "videos" / f"train{n:05d}.mp4" for n in (0, 5, 10, 15, 20)}
    empty, cut, letter, missing, sound = paths.values()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:700])
    letter.write_text("a letter, not a film")
    missing.unlink()
    write_audio(sound)
    return [*data, "data.train.unreadable=drop"], paths


@pytest.fixture(scope="module")
def finished(shared_ray, overrides, qwen2_5_pair, broken_clips) -> Path:
    """Qwen2.5-VL at lag 1, by video, at a temperature, with the whole vocabulary's KL.

    One more clip breaks after the start-up checks.
    """
    data, paths = broken_clips
    path = paths["train00000"].with_name("train00003.mp4")
    whole = path.read_bytes()
    more = [f"num_steps={STEPS}", "run_name=lag1", "max_policy_lag=1"]
    command = [sys.executable, "-c", BREAKING.format(path=str(path)), *overrides, *SHRUNK, *data, *more]
    command += ["checkpoint_every=2", "snapshot_every=3", "curriculum.group_by_video=true"]
    command += ["rollout.temperature=0.9", *qwen2_5_pair, "loss.kind=opd_full", "loss.clamp=null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, check=False)
    path.write_bytes(whole)
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(load_config(DEMO, overrides).runs_dir) / "lag1"


def test_every_step_is_recorded_with_lags_within_the_bound(finished):
    metrics = metrics_of(finished)
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert [m["policy_version"] for m in metrics] == list(range(1, STEPS + 1))
    assert {m["actors/policy_lag_max"] for m in metrics} == {0.0, 1.0}
    assert all(m["learner/logprob_gap_p99"] < 1e-3 for m in metrics if m["actors/policy_lag_max"] == 0)
    assert all(m["learner/loss"] > 0 and m["learner/grad_norm"] > 0 for m in metrics)
    assert all(m["teacher/entropy"] > 0 and m["learner/entropy"] > 0 for m in metrics)
    for cache in ("prefix_cache", "mm_cache"):
        assert all(0 <= m[f"actors/{cache}_hit_frac"] < 1 for m in metrics)


def test_every_trajectory_is_trained_on_once_and_logged(finished):
    rows = trajectories_of(finished)
    assert Counter(r["step"] for r in rows) == dict.fromkeys(range(STEPS), GROUPS)
    assert len({r["trajectory_id"] for r in rows}) == STEPS * GROUPS
    assert all(r["step"] - 1 <= r["policy_version"] <= r["step"] for r in rows)
    assert all(
        len(r["response_token_ids"]) == len(r["actor_logprobs"]) == len(r["teacher_logprobs"]) > 0
        for r in rows
    )


def test_a_clip_that_fails_while_running_is_retired_and_counted(finished, broken_clips):
    summary = json.loads((finished / "summary.json").read_text())
    dropped = {i: r for i, r in summary["dropped"].items() if i.split(":")[0] not in broken_clips[1]}
    assert dropped
    assert all(prompt_id.startswith("train00003:") for prompt_id in dropped)
    assert all("train00003.mp4" in reason for reason in dropped.values())
    assert not any(r["prompt_id"].startswith("train00003:") for r in trajectories_of(finished))
    records = pq.read_table(finished / "curriculum" / "records.parquet").to_pylist()
    assert {r["prompt_id"]: r["dropped"] for r in records if r["dropped"]} == summary["dropped"]
    assert sum(r["num_rollouts"] for r in records) == STEPS * GROUPS


def test_clips_that_cannot_be_read_are_named_and_have_their_places_in_the_pool(
    finished, overrides, broken_clips, tmp_path
):
    data, paths = broken_clips
    summary = json.loads((finished / "summary.json").read_text())
    dropped = {i: r for i, r in summary["dropped"].items() if i.split(":")[0] in paths}
    config = load_config(DEMO, [*overrides, *SHRUNK, *data])
    lines = Path(config.data.sources[""].annotations).read_text().splitlines()
    good = [line if line.split()[0] not in paths else "" for line in lines]
    assert len(dropped) == good.count("") and {i.split(":")[0] for i in dropped} == set(paths)
    assert all(str(paths[prompt_id.split(":")[0]]) in reason for prompt_id, reason in dropped.items())
    kinds = {reason.replace(prompt_id[:10], "") for prompt_id, reason in dropped.items()}
    assert len(kinds) >= 3, "missing, no video, undecodable"
    (tmp_path / "good.txt").write_text("\n".join(good))
    options = [*overrides, *SHRUNK, *data, f"data.train.annotations={tmp_path}/good.txt"]
    of_good = make_plan(load_config(DEMO, options))
    of_all = make_plan(config)
    assert of_good.train.failed == {} and of_all.train.failed.keys() == dropped.keys()
    assert [str(p) for p in of_good.train.prompts] == [str(p) for p in of_all.train.prompts]
    records = pq.read_table(finished / "curriculum" / "records.parquet")
    assert records["prompt_id"].to_pylist() == [p.prompt_id for p in of_all.train.pool]


def test_the_run_folder_is_complete(finished):
    expected = ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "commands.txt")
    for name in (*expected, "curriculum/records.parquet"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").iterdir())
    assert json.loads((finished / "student" / "export.json").read_text())["step"] == STEPS
    assert {f.name for f in (finished / "checkpoints").iterdir()} == {"step-2", "step-4"}
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["max_policy_lag"] == 1
    assert config["environment"]["versions"]["ray"]
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("teacher", "student_before", "student_after"):
        assert {"miou", "r1@0.3", "r1@0.5", "r1@0.7", "n", "unparsed"} <= summary[name].keys()
        assert summary[name]["n"] == 4
    assert summary["baselines"].keys() == {"best_constant", "random", "no_video"}
    assert summary["tokens"]["rollout"] == sum(
        len(r["response_token_ids"]) for r in trajectories_of(finished)
    )
    assert "data:image/png;base64," in (finished / "report.html").read_text()


def test_the_exported_student_has_the_updated_weights(finished, qwen2_5_pair):
    student = qwen2_5_pair[0].removeprefix("student=")
    start = dict(load_model(student, "float32").named_parameters())
    end = dict(load_model(str(finished / "checkpoints" / "step-4" / "student"), "float32").named_parameters())
    assert start.keys() == end.keys()
    assert any((start[n] != end[n]).any() for n in start)
    assert [f.name for f in (finished / "snapshots").iterdir()] == ["step-3"]
    between = finished / "snapshots" / "step-3"
    before_end = dict(load_model(str(between), "float32").named_parameters())
    assert start.keys() == before_end.keys() and any((before_end[n] != end[n]).any() for n in end)
    exported = {f.name for f in (finished / "student").iterdir()}
    assert exported == {f.name for f in between.iterdir()} | {"README.md"}


TVDF = [
    "curriculum.teacher_threshold=0",
    "curriculum.num_teacher_predictions=2",
    "teacher_pool.engine=vllm",
    "loss.kind=opd",
]


@pytest.fixture(scope="module")
def tvdf(shared_ray, overrides) -> Path:
    """Two rounds of two steps, each selected by the reverse KL of its student; a vLLM teacher; by LoRA."""
    more = [
        "num_steps=4",
        "checkpoint_every=3",
        "run_name=tvdf",
        "curriculum.kind=tvdf",
        "curriculum.num_selected=12",
        "curriculum.disagreement=reverse_kl",
        "learner.lora_rank=4",
        *("learner.warmup_frac=0", "learner.final_lr_frac=1"),  # whatever num_steps it is resumed with
    ]
    done = run_launch(*overrides, *SHRUNK, *TVDF, *more)
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(load_config(DEMO, overrides).runs_dir) / "tvdf"


def prompts_by_step(run: Path) -> dict[int, list[str]]:
    steps = defaultdict(list)
    for row in trajectories_of(run):
        steps[row["step"]].append(row["prompt_id"])
    return steps


def test_every_round_selects_the_largest_disagreements_and_trains_on_each_once(tvdf):
    steps = prompts_by_step(tvdf)
    for number in (1, 2):
        records = pq.read_table(tvdf / "curriculum" / f"round-{number}.parquet").to_pylist()
        selected = [r for r in records if r["selected"]]
        assert len(selected) == 12
        assert all(r["teacher_iou"] is not None and len(r["student_iou"]) == number for r in records)
        assert np.mean([r["disagreement"] for r in records]) > 0, "an estimate of the mean KL"
        largest = sorted((r["disagreement"] for r in records), reverse=True)
        assert sorted((r["disagreement"] for r in selected), reverse=True) == largest[:12]
        trained = [p for step in (2 * number - 2, 2 * number - 1) for p in steps[step]]
        assert sorted(trained) == sorted(r["prompt_id"] for r in selected)
    assert [m["curriculum/round"] for m in metrics_of(tvdf)] == [1, 1, 2, 2]
    answers = pq.read_table(tvdf / "curriculum" / "teacher_answers.parquet").to_pylist()
    assert Counter(a["prompt_id"] for a in answers) == {r["prompt_id"]: 2 for r in records}
    summary = json.loads((tvdf / "summary.json").read_text())
    assert summary["teacher_answers"] == len(answers)
    scored = 4 * GROUPS + 2 * len(records)
    assert (summary["teacher_calls"], summary["suspended_rollouts"]) == (scored, 0)
    assert checkpoint_steps(tvdf) == [2, 3, 4], "that of step 2 follows the second selection"
    state = json.loads((tvdf / "checkpoints" / "step-2" / "state.json").read_text())
    assert (state["step"], state["curriculum"]["round_end"]) == (2, 4)
    report = (tvdf / "report.html").read_text()
    assert "teacher IoU, kept and dropped" in report and "disagreement by round" in report


def test_actors_sample_with_the_learners_adapters(tvdf):
    metrics = metrics_of(tvdf)
    assert all(m["learner/grad_norm"] > 0 and m["learner/logprob_gap_p99"] < 1e-3 for m in metrics)
    published = json.loads((tvdf / "summary.json").read_text())["published_bytes"]
    student = tvdf / "checkpoints" / "step-4" / "student" / "model.safetensors"
    assert 0 < published < STEPS * student.stat().st_size / 4, "adapters, not weights"


def parameters_apart(run: Path, other: Path, student: str) -> float:
    """The largest difference of their last students, in parts of the largest change since `student`."""
    folders = (student, *(r / "checkpoints" / f"step-{STEPS}" / "student" for r in (run, other)))
    begin, end, same = (dict(load_model(str(f), "float32").named_parameters()) for f in folders)
    with torch.no_grad():
        moved, apart = (max(float((end[n] - of[n]).abs().max()) for n in end) for of in (begin, same))
    assert moved > 1e-4
    return apart / moved


def test_a_run_that_goes_back_into_a_round_does_what_is_left_of_it_and_ends_with_its_budget_of_tokens(
    tvdf, capsys, config, tmp_path
):
    """From the checkpoint in the middle of the second round; what the run had after that is set aside.

    A video of each split is gone meanwhile: the prompts of one are dropped, those of the other are IoU 0.
    """
    copy = tmp_path / "resumed"
    shutil.copytree(tvdf, copy)
    next_videos = {prompt.split(":")[0] for prompt in prompts_by_step(tvdf)[3]}
    lost = next(v for p in prompts_by_step(tvdf)[0] if (v := p.split(":")[0]) not in next_videos)
    folders = []
    for split, name in (("train", lost), ("eval", "eval00000")):
        shutil.copytree(getattr(config.data, split).videos, tmp_path / split)
        (tmp_path / split / f"{name}.mp4").unlink()
        folders.append(f"data.{split}.videos={tmp_path / split}")
    scored = json.loads((copy / "checkpoints" / "step-3" / "state.json").read_text())["totals"][
        "scored_tokens"
    ]
    more = ["num_steps=50", f"max_scored_tokens={scored + 1}", "teacher_pool.engine=transformers", *folders]
    done = run_launch("--resume", str(copy), "--step", "3", *more)
    assert done.returncode == 0, done.stderr[-4000:]
    assert prompts_by_step(copy) == prompts_by_step(tvdf)
    assert yaml.safe_load((copy / "config.yaml").read_text())["num_steps"] == 50, (
        "the run's own config from now on"
    )
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["steps"] == len(metrics_of(copy)) == 4
    assert {name.split(":")[0] for name in summary["dropped"]} == {lost}
    assert {name.split(":")[0] for name in summary["failed_eval"]} == {"eval00000"}
    reasons = [*summary["dropped"].values(), *summary["failed_eval"].values()]
    assert all(".mp4 is missing" in reason for reason in reasons)
    assert summary["student_after"]["n"] == summary["baselines"]["random"]["n"] == 4
    assert summary["student_after"]["unparsed"] >= len(summary["failed_eval"])
    assert {f.name for f in (copy / "curriculum").iterdir()} == {
        f.name for f in (tvdf / "curriculum").iterdir()
    }
    (aside,) = (copy / "set-aside").iterdir()
    assert str(aside) in done.stdout
    assert check_whole(aside / "checkpoints" / "step-4") and metrics_of(aside) == metrics_of(tvdf)
    assert trajectories_of(aside) == trajectories_of(tvdf)
    whole = [f"data.{s}.videos={getattr(config.data, s).videos}" for s in ("train", "eval")]
    refused = bad(capsys, "--resume", str(copy), "curriculum.trpv=false", "num_steps=60", *whole)
    assert "the curriculum the run was started with" in refused
    assert parameters_apart(copy, aside, config.student) < 1e-3, "it ends as the undisturbed run did"


def test_coupling_suspends_before_scoring_and_a_second_run_generates_no_teacher_answers(
    overrides, tvdf, config
):
    """scc.suspend_iou=0 suspends all rollouts: no teacher call, no optimizer step, no answer made again.

    Nine prompts in three steps at lag 1, by the schedule: shares of 1, 0.3 and 0.05.
    """
    more = [
        "num_steps=3",
        "max_policy_lag=1",
        "curriculum.num_selected=9",
        "run_name=scc",
        "curriculum.kind=scc",
        "curriculum.scc.anchor_frac=0",
        "curriculum.scc.suspend_iou=0",
    ]
    done = run_launch(*overrides, *SHRUNK, *TVDF, *more)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tvdf.with_name("scc")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["teacher_answers"], summary["teacher_calls"], summary["tokens"]["scored"]) == (0, 0, 0)
    assert summary["rollouts"] == summary["suspended_rollouts"] == 9
    assert [m["curriculum/presented"] for m in metrics_of(run)] == [6, 2, 1]
    answers = [pq.read_table(r / "curriculum" / "teacher_answers.parquet").to_pylist() for r in (run, tvdf)]
    assert sorted(map(str, answers[0])) == sorted(map(str, answers[1]))
    assert [(m["curriculum/suspended_frac"], m["learner/skipped"]) for m in metrics_of(run)] == [
        (1.0, 1.0)
    ] * 3
    start, end = (
        dict(load_model(str(f), "float32").named_parameters())
        for f in (config.student, run / "checkpoints/step-3/student")
    )
    assert all((start[n] == end[n]).all() for n in start)
    records = pq.read_table(run / "curriculum" / "records.parquet").to_pylist()
    assert [r["prompt_id"] for r in records if r["selected"]] == [
        r["prompt_id"] for r in records if r["suspended"] and r["num_rollouts"] == 1
    ]


GRPO = [
    "loss.kind=grpo",
    "loss.clamp=null",
    "rollout.rollouts_per_prompt=2",
    "loss.rewards=[tests.real.test_launch:longer]",
]


def longer(trajectory, prompt) -> float:
    """A reward that random models can earn."""
    return float(len(trajectory.text))


def test_grpo_needs_no_teacher_and_makes_that_of_the_next_run(overrides, config, encoder, prompts):
    by_difficulty = ["curriculum.kind=difficulty", "curriculum.num_selected=12"]
    more = [*by_difficulty, "curriculum.num_student_predictions=1"]
    done = run_launch(*overrides, *SHRUNK, *GRPO, *more, "teacher=null", "num_steps=2", "run_name=grpo")
    assert done.returncode == 0, done.stderr[-4000:]
    run = Path(config.runs_dir) / "grpo"
    records = pq.read_table(run / "curriculum" / "records.parquet").to_pylist()
    assert {r["prompt_id"] for r in records if r["num_rollouts"]} == {
        r["prompt_id"] for r in records if r["selected"]
    }
    assert all(r["teacher_iou"] is None and len(r["student_iou"]) == 1 for r in records)
    summary = json.loads((run / "summary.json").read_text())
    metrics, rows = metrics_of(run), trajectories_of(run)
    assert (
        summary["teacher"] is None and summary["teacher_calls"] == 0 and summary["rollouts"] == 2 * 2 * GROUPS
    )
    assert all(m["learner/reward"] > 0 and m["learner/flat_groups_frac"] < 1 for m in metrics)
    assert metrics[1]["learner/logprob_gap_p99"] < 1e-3, "the actors sample with the published weights"
    assert all(r["teacher_logprobs"] is None for r in rows)

    student = run / "checkpoints" / "step-2" / "student"
    taught = ["loss.kind=opd_full", "loss.clamp=null", f"teacher={student}"]
    assert make_plan(load_config(DEMO, [*overrides, *SHRUNK, *taught])).train.prompts, "a launch would begin"
    models = [load_model(str(folder), "float32").eval() for folder in (config.student, student)]
    of_id, kl = {p.prompt_id: p for p in prompts}, []
    for row in [r for r in rows if r["policy_version"] == 0]:
        prompt, response = encoder.encode(of_id[row["prompt_id"]]), np.array(row["response_token_ids"])
        before, after = (reference_logprobs(model, prompt, response) for model in models)
        kl.extend((np.exp(before) * (before - after)).sum(-1))
    assert 0 < np.mean(kl) < 0.5, "two steps away from its student, the teacher is near"


def test_sft_learns_the_ground_truth_with_neither_teacher_nor_actors(overrides, config):
    more = ["loss.kind=sft", "loss.clamp=null", "teacher=null", "rollout.num_actors=0", "learner.lr=3e-3"]
    done = run_launch(*overrides, *SHRUNK, *more, "num_steps=8", "run_name=sft")
    assert done.returncode == 0, done.stderr[-4000:]
    run = Path(config.runs_dir) / "sft"
    losses = [m["learner/loss"] for m in metrics_of(run)]
    assert losses[-1] < losses[0] - 0.5
    rows = trajectories_of(run)
    assert (
        all(r["text"].startswith("From ") and r["spans_s"][0][0] < r["spans_s"][0][1] for r in rows)
        and len(rows) == 8 * GROUPS
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["teacher"] is summary["student_before"] is summary["student_after"] is None
    assert (summary["rollouts"], summary["tokens"]["rollout"], summary["published_bytes"]) == (0, 0, 0)
    assert [m["learner/num_tokens"] > 0 for m in metrics_of(run)] == [True] * 8
    assert (run / "report.html").is_file() and (run / "checkpoints" / "step-8" / "student").is_dir()


def bad(capsys, *arguments: str) -> str:
    """The one line that launch.py says of bad input, and nothing may have been started."""
    import ray

    assert launch.main(list(arguments)) == 2
    assert not ray.is_initialized()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_dry_run_prints_the_plan_and_starts_nothing(overrides, capsys):
    import ray

    assert launch.main([*overrides, *SHRUNK, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not ray.is_initialized()
    assert all(
        word in out
        for word in (
            "student",
            "teacher",
            "actors",
            "data",
            "loss",
            "frames 24 to 24",
            "tokens 12 to 12",
            "in all",
        )
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lrr=1", "unknown key learner.lrr; did you mean learner.lr?"),
        ("learner.lr=fast", "learner.lr='fast'"),
        ("num_steps=null", "num_steps"),
        ("rollout.temperature=0", "rollout.temperature=0"),
        ("groups_per_step=100000", "lower groups_per_step"),
        ("teacher=/nowhere", "/nowhere/config.json"),
        ("data.train.videos=/nowhere", "/nowhere/"),
        ("video.max_video_tokens=3", "max_video_tokens=3"),
        ("curriculum={kind: tvdf, num_selected: 100000}", "num_selected=100000"),
        ("curriculum.scc.frontier_iou=0.8", "frontier_iou=0.8"),
        ("loss={kind: grpo}", "rollouts_per_prompt >= 2"),
        ("loss={kind: grpo, clamp: 3}", "clamp does nothing for kind=grpo"),
        ("loss={kind: opd_full, divergence: jsd, beta: 1.5}", "loss.beta=1.5"),
        ("loss={kind: opd_topk, top_k: 100000}", "loss.top_k=100000, but the teacher has"),
        ("loss={kind: opd, top_k_of: student}", "top_k_of does nothing for kind=opd"),
        ("teacher=null", "needs a teacher"),
        ("learner.betas=[0.9", "'learner.betas=[0.9': the value is not YAML"),
        ("--nosuch", "unrecognized arguments: --nosuch"),
    ],
)
def test_bad_configuration_is_one_line(overrides, capsys, override, expected):
    assert expected in bad(capsys, *overrides, *SHRUNK, override)


def test_a_missing_config_file_and_a_missing_run_are_one_line(capsys, tmp_path):
    assert "nowhere.yaml" in bad(capsys, "--config", str(tmp_path / "nowhere.yaml"))
    assert "config.yaml" in bad(capsys, "--resume", str(tmp_path))
    assert "--resume names no run" in bad(capsys, "--resume", "")


def test_another_tokenizer_is_refused_before_anything_starts(overrides, capsys, models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    assert "2 tokens differ" in bad(capsys, *overrides, f"teacher={tmp_path / 'teacher'}")


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(
    finished, qwen2_5_pair, capsys, tmp_path
):
    copy = tmp_path / "other"
    shutil.copytree(finished, copy)
    line = bad(capsys, "--resume", str(copy), qwen2_5_pair[1].replace("teacher=", "student="))
    assert "another model" in line
    assert "text.hidden_size" in line


def test_a_checkpoint_that_cannot_be_used_is_one_line_before_anything_starts(finished, capsys, tmp_path):
    copy = tmp_path / "unusable"
    shutil.copytree(finished, copy)
    assert "no checkpoint of step 3: it has those of steps 2, 4" in bad(
        capsys, "--resume", str(copy), "--step", "3"
    )
    assert "learner.world_size" not in bad(capsys, "--resume", str(copy), "learner.zero_stage=3")
    assert "data.eval" in bad(capsys, "--resume", str(copy), "data.eval.max_prompts=3")
    state = copy / "checkpoints" / "step-4" / "state.json"
    state.write_bytes(state.read_bytes().replace(b"step", b"stop"))
    assert "step-4 is damaged: state.json is not the file that was written" in bad(
        capsys, "--resume", str(copy)
    )
    os.truncate(state, 100)
    assert "state.json has 100 of" in bad(capsys, "--resume", str(copy), "--step", "4")
    assert "give --resume RUN" in bad(capsys, "--step", "4")
    assert "nosuch://bucket/run" in bad(capsys, "--resume", "nosuch://bucket/run")
    assert "is not a run" in bad(capsys, "--resume", f"file://{tmp_path}/none")


def test_a_place_that_cannot_be_written_to_is_one_line(overrides, capsys):
    assert "nosuch://bucket" in bad(capsys, *overrides, *SHRUNK, "checkpoint_url=nosuch://bucket")
    assert "cannot be written to" in bad(capsys, *overrides, *SHRUNK, f"checkpoint_url=file://{DEMO}/below")


def test_bad_annotations_and_clips_name_the_line(overrides, capsys, clips, tmp_path):
    def broken(change) -> str:
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        shutil.copytree(clips / "train", tmp_path / "train")
        change(tmp_path / "train")
        paths = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
        return bad(
            capsys, *overrides, *(f"data.train.{k}={tmp_path / 'train' / v}" for k, v in paths.items())
        )

    def beyond(folder):
        (folder / "annotations.txt").write_text("train00000 3.0 13.5##the red square is visible\n")

    assert "annotations.txt:1: the annotation ends at 13.5 s" in broken(beyond)
    assert "missing" in broken(lambda folder: (folder / "videos" / "train00002.mp4").unlink())
    assert "cannot be" in broken(
        lambda folder: (folder / "videos" / "train00001.mp4").write_bytes(b"not a video")
    )


def test_prompts_of_the_demo_match_their_files(config):
    prompts = read_prompts(config.data.train, config.video, 32)
    assert len({p.prompt_id for p in prompts}) == len(prompts) > 16
    assert all(
        p.answer_spans_s and 0 <= p.answer_spans_s[0][0] < p.answer_spans_s[0][1] <= 12 for p in prompts
    )
