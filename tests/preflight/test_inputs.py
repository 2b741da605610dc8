"""A plan's splits: what a start refuses, what a resume goes on without, and prompts that are too long."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import evaluation.__main__
from curriculum.scheduler import Scheduler
from curriculum.state import check_state
from driver.progress import setup_of
from preflight.dry_run import describe
from preflight.inputs import check_pool, check_routes, make_draft, make_plan
from preflight.memory_fit import memory_plan
from preflight.model_shapes import read_shapes
from preflight.views import check_crop
from teacher_service.views import ViewEncoder
from tests.fakes import make_prompt
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.config_teachers import TeacherModel
from video_opd.datasets import Split
from video_opd.errors import ClipError, ConfigError, DataError
from video_opd.grounding import blind_baselines, evaluate
from video_opd.types import FailedPrompt, Prediction
from video_opd.video import descriptions
from video_opd.video.decode_pool import shared_pool


@dataclass
class Run:
    """A folder with both splits, and the overrides that name them."""

    folder: Path

    def config(self, *overrides: str) -> Config:
        names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
        data = [f"data.{s}.{k}={self.folder / s / v}" for s in ("train", "eval") for k, v in names.items()]
        models = [f"{m}={ROOT / 'demo' / 'models' / m}" for m in ("student", "teacher")]
        small = ["groups_per_step=4", "max_policy_lag=0", f"runs_dir={self.folder / 'runs'}"]
        return load_demo([*models, *data, *small, *overrides])

    def video(self, split: str, number: int) -> Path:
        return self.folder / split / "videos" / f"train{number:05d}.mp4"


@pytest.fixture
def run(split_folder, tmp_path) -> Run:
    for split in ("train", "eval"):
        shutil.copytree(split_folder, tmp_path / split)
    return Run(tmp_path)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_start_refuses_a_video_and_a_resume_goes_on_without_it(split, run, caplog):
    config = run.config()
    before = make_plan(config)
    state = Scheduler(before.train.pool, config).state_dict()
    run.video(split, 2).unlink()
    with pytest.raises(ClipError, match=r"train00002\.mp4 is missing"):
        make_plan(config)
    after = make_plan(config, resumes=True)
    assert setup_of(config, after) == setup_of(config, before)
    check_state(state, [p.prompt_id for p in after.train.pool], config)
    failed = (after.train if split == "train" else after.eval).failed
    assert failed and all("train00002.mp4 is missing" in reason for reason in failed.values())
    (said,) = [record.message for record in caplog.records if record.name == "video_opd"]
    assert f"data.{split}: {len(failed)} of {len(before.eval)} prompts are " in said


def test_an_evaluation_counts_every_prompt_of_the_split(run):
    run.video("eval", 2).unlink()
    plan = make_plan(run.config(), resumes=True)
    truth = [
        Prediction(prompt_id=p.prompt_id, text="", spans_s=(p.answer_spans_s or ((0.0, 0.0),))[:1])
        for p in plan.eval.prompts
    ]
    scores = evaluate(truth, plan.eval.pool)
    assert scores["n"] == len(plan.eval) and scores["unparsed"] == len(plan.eval.failed) > 0
    assert scores["miou"] == pytest.approx(len(plan.eval.prompts) / len(plan.eval))
    blind = blind_baselines(plan.train.prompts, plan.eval.pool)
    assert {b["n"] for b in blind.values()} == {len(plan.eval)}


def test_a_resume_needs_no_more_prompts_than_are_left(run):
    options = ("curriculum.kind=tvdf", f"curriculum.num_selected={len(make_plan(run.config()).train)}")
    run.video("train", 2).unlink()
    make_plan(run.config(*options), resumes=True)


def test_a_sample_of_the_pool_must_fill_the_slots(run):
    with pytest.raises(
        ConfigError, match=r"^1 training prompts cannot fill .*: raise curriculum.pool_sample"
    ):
        make_plan(run.config("curriculum.kind=tvdf", "curriculum.pool_sample=1"))
    make_plan(run.config("curriculum.pool_sample=1"))  # uniform asks nobody
    config = run.config("curriculum={kind: tvdf, pool_sample: 5, num_selected: 4}")
    assert "4 selected of 5 asked a round by disagreement (iou, top_k)" in describe(
        config, make_draft(config)
    )
    config = run.config("curriculum={kind: difficulty, num_selected: 4, difficulty_std: 0.1}")
    assert "4 selected, drawn around a student IoU of 0.3 +- 0.1" in describe(config, make_draft(config))


def test_a_schedule_has_a_prompt_for_each_step_and_the_plan_says_how_many_it_presents(run):
    with pytest.raises(
        ConfigError, match=r"^\d+ training prompts for the 400 steps of SCC's schedule: lower"
    ):
        make_plan(run.config("curriculum.kind=scc"))
    config = run.config(
        "curriculum={kind: scc, num_selected: 5}", "num_steps=5", "rollout.rollouts_per_prompt=2"
    )
    said = describe(config, make_draft(config))
    assert "5 steps of at most 4 prompts, 10 rollouts" in said
    assert "5 selected, a share of 0.1 Anchors, presented once, fewer and fewer a step; rollouts of" in said
    gated = run.config("curriculum.scc.gate=true")
    assert "all; rollouts of IoU 0.7 or more are suspended" in describe(gated, make_draft(gated))


@pytest.mark.parametrize(
    ("overrides", "user"),
    [
        (["curriculum.scc.gate=true"], "curriculum.scc.gate"),
        (["curriculum={kind: tvdf, scc: {gate: true}}"], "curriculum.kind=tvdf"),
        (["loss.task_weight=0.5", "loss.on_policy_frac=0.5"], "loss.task_weight and loss.on_policy_frac"),
        ([], None),
    ],
    ids=["uniform, gate", "tvdf, gate", "signals", "uniform"],
)
def test_whoever_compares_with_the_ground_truth_needs_it(run, overrides, user):
    config, prompts = run.config(*overrides), [make_prompt(f"p{i}", answers=None) for i in range(9)]
    with pytest.raises(ConfigError, match=f"^{user} need ground truth") if user else nullcontext():
        check_pool(config, Split(pool=[*prompts], key=""))


def long_query(run: Run, split: str) -> str:
    """Makes the query of line 2 long; the prompt's id."""
    path = run.folder / split / "annotations.txt"
    lines = path.read_text().splitlines()
    lines[1] += ", and 7" * 80
    path.write_text("\n".join(lines) + "\n")
    return f"{lines[1].split()[0]}:2"


@pytest.mark.parametrize("check", [make_plan, make_draft])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_prompt_that_no_engine_can_take_is_named_before_the_start(split, check: Any, run):
    name = long_query(run, split)
    with pytest.raises(
        DataError, match=rf"prompt {name}: its (\d+) tokens .* rollout.max_model_len=256"
    ) as caught:
        check(run.config())
    needed = str(caught.value).split("set it to ")[1].split()[0]
    assert check(run.config(f"rollout.max_model_len={needed}")).longest[split] == int(needed) - 16
    with pytest.raises(DataError, match="max_model_len"):
        check(run.config(f"rollout.max_model_len={int(needed) - 1}"))


def test_no_advice_to_drop_where_all_would_be_dropped(run):
    with pytest.raises(DataError, match=r"such prompts in data\.train\)$"):
        make_plan(run.config("data.train.too_long=drop", "rollout.max_model_len=20"))


def test_an_evaluation_leaves_no_workers_that_opened_videos_beside_vllm(run, monkeypatch):
    config = run.config()
    pool = shared_pool(descriptions._in_parallel(config.video))
    left: list[Any] = []

    def ask(_: Config, prompts: Any, blanks: bool) -> Any:
        left.extend(worker for worker in pool._idle.queue if worker)
        return [[FailedPrompt(prompt_id=p.prompt_id, reason="") for p in prompts]]

    monkeypatch.setattr(evaluation.__main__, "ask_model", ask)
    evaluation.__main__.answers_of_model(config, False)
    assert not left


def test_an_evaluation_refuses_it_before_vllm_starts(run, monkeypatch):
    monkeypatch.setattr(evaluation.__main__, "ask_model", lambda *_, **__: pytest.fail("vLLM would start"))
    name = long_query(run, "eval")
    with pytest.raises(DataError, match=rf"prompt {name}: its \d+ tokens .* rollout.max_model_len=256"):
        evaluation.__main__.answers_of_model(
            run.config("rollout.num_actors=0", "loss.kind=sft", "loss.clamp=null"), False
        )


@pytest.mark.parametrize("check", [make_plan, make_draft])
def test_a_training_prompt_that_is_too_long_is_dropped_by_place_if_asked(check: Any, run):
    whole = check(run.config())
    name = long_query(run, "train")
    split = check(run.config("data.train.too_long=drop")).train
    assert [p.prompt_id for p in split.pool] == [p.prompt_id for p in whole.train.pool]
    assert split.failed.keys() == {name} and "rollout.max_model_len=256" in split.failed[name]


def test_the_routes_of_many_prompts_are_checked_without_making_teachers_anew(run, monkeypatch):
    made = []
    monkeypatch.setattr(TeacherModel, "__init__", lambda self, **fields: made.append(fields), raising=True)
    config = run.config()
    monkeypatch.setattr(TeacherModel, "scores", lambda *_: True)
    check_routes(config, [make_prompt(f"p{i}") for i in range(100)], [])
    assert len(made) < 5


def teachers(**view: Any) -> list[str]:
    """Overrides for the student as its own teacher."""
    own = [{"name": "self", "model": str(ROOT / "demo/models/student"), **view}]
    return ["teacher=null", f"teachers={json.dumps(own)}"]


def test_what_a_teacher_alone_sees_is_counted_and_bounds_the_prompts(run):
    plain = make_plan(run.config(*teachers()))
    assert plain.views == ()
    more = {"video": {"fps": 4.0, "max_frames": 48, "max_video_tokens": 512}}
    plan = make_plan(run.config(*teachers(**more)))
    asked = len(plan.views)
    assert asked == 2 and min(v.max_prompt_tokens for v in plan.views) > max(plain.longest.values())
    config = run.config(*teachers(**more))
    assert make_draft(config).views == plan.views
    encoder = ViewEncoder(config, config.teachers[0])
    splits = plan.train.prompts, plan.eval.prompts
    lengths = [max(len(encoder.token_ids(encoder.seen(p))) for p in prompts) for prompts in splits]
    assert [v.max_prompt_tokens for v in plan.views] == lengths
    peaks = [memory_plan(c, p, 80).roles for c, p in ((run.config(*teachers()), plain), (config, plan))]
    before, after = (next(r.host.peak_bytes for r in of if r.role == "teacher") for of in peaks)
    assert after > before
    bounded = ["teacher_pool.engine=vllm", f"teacher_pool.max_model_len={max(lengths)}"]
    make_plan(run.config(*teachers(), *bounded))
    with pytest.raises(DataError, match=r"exceed teacher_pool\.max_model_len"):
        make_plan(run.config(*teachers(**more), *bounded))


def test_a_crop_needs_true_spans_and_a_teacher_that_reads_times(run):
    plan = make_plan(run.config(*teachers(crop_margin_frac=0.5)))
    assert plan.views[0].max_video_tokens <= plan.views[1].max_video_tokens
    (teacher,) = run.config(*teachers(crop_margin_frac=0.5)).teachers
    shapes = read_shapes(teacher.model)
    unlabelled = [make_prompt("a"), make_prompt("b", None), make_prompt("c", None)]
    with pytest.raises(ConfigError, match="needs ground truth, which prompt b and 1 others lack"):
        check_crop(teacher, shapes, unlabelled)
    with pytest.raises(ConfigError, match="qwen2_5_vl counts times from the first frame"):
        check_crop(teacher, replace(shapes, model_type="qwen2_5_vl"), [])
