"""Several teachers: who scores which prompt, and what their scores become."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from curriculum.answers import prompt_keys, settings_key
from learner.engine import rows_of
from learner.loss import sampled_advantage
from preflight.inputs import check_routes
from teacher_service.calls import ScoreResult
from teacher_service.following import Weights
from teacher_service.teachers import Teachers, combine, combine_results, create_teacher
from tests.fakes import make_group, make_prompt
from tests.video_opd.test_config import MINIMAL
from video_opd.config import Config
from video_opd.config_file import dump_config, load_config, parse_config, resolve_paths
from video_opd.errors import ConfigError
from video_opd.types import FailedPrompt, Prediction, Prompt, TeacherScores, TopK, TrajectoryGroup

ALONE = {k: v for k, v in MINIMAL.items() if k != "teacher"}
MATHS, COOKS, ALL = (
    {"name": "maths", "model": "m"},
    {"name": "cooks", "model": "c"},
    {"name": "all", "model": "a"},
)


def config_with(*teachers: dict[str, Any], **more: Any) -> Config:
    return parse_config(ALONE | {"teachers": list(teachers), "groups_per_step": 1} | more, "test")


def scores_of(values: Sequence[float], name: str = "t", entropy: bool = True) -> TeacherScores:
    logprobs = np.asarray(values, np.float32)
    return TeacherScores(
        trajectory_id="x",
        teacher_id=name,
        teacher_logprobs=logprobs,
        top_k=TopK(ids=np.zeros((len(values), 2), np.int32), logprobs=np.zeros((len(values), 2), np.float32)),
        entropy=-logprobs if entropy else None,
    )


# --- configuration ---


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (MINIMAL | {"teachers": [MATHS]}, "teacher and teachers are both set"),
        (ALONE | {"teachers": [MATHS, MATHS]}, "give each a name of its own"),
        (ALONE | {"teachers": [MATHS | {"prompts": "("}]}, "not a regular expression"),
        (ALONE | {"teachers": [MATHS | {"weight": 0}]}, "weight"),
        (ALONE | {"teachers": [MATHS | {"weight": float("nan")}]}, "weight"),
        (
            ALONE
            | {"teachers": [MATHS | {"weight": 1.5}, COOKS | {"weight": -0.5}]}
            | {"loss": {"kind": "grpo", "kl_coef": 0.1}, "rollout": {"rollouts_per_prompt": 2}},
            "kl_coef is a KL to one reference",
        ),
        (ALONE | {"teachers": [MATHS | {"name": "a/b"}]}, "name"),
        (ALONE | {"teachers": [{"name": "m"}]}, "missing key teachers.0.model"),
        (ALONE | {"teachers": [MATHS | {"video": {"decoder": "pyav"}}]}, "video.decoder is the same for all"),
        (ALONE | {"teachers": [MATHS | {"video": {"fps": -1}}]}, "teachers maths: .* fps: "),
        (ALONE | {"teachers": [MATHS | {"prompt": {"template": "When?"}}]}, "must contain {query}"),
        (ALONE | {"teachers": [MATHS | {"video": {"fps": 2.0}}]}, "so they change nothing"),
        (
            ALONE | {"teachers": [MATHS | {"prompt": {"answer_template": "{start}"}}]},
            "so they change nothing",
        ),
        (ALONE | {"teachers": [MATHS | {"crop_margin_frac": -0.1}]}, "crop_margin_frac"),
        (ALONE, "needs a teacher"),
    ],
)
def test_teachers_that_cannot_be_are_refused(tree, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(tree, "test")


def test_one_teacher_is_the_list_of_it(tmp_path):
    config = parse_config(MINIMAL | {"teacher": "models/Some Model"}, "test")
    (teacher,) = config.teacher_models
    assert (teacher.name, teacher.model, teacher.weight) == ("Some_Model", "models/Some Model", 1.0)
    assert config.teachers_of("anything") == (teacher,)


def test_teachers_survive_the_run_folder_and_their_paths_are_resolved(tmp_path):
    config = resolve_paths(config_with(MATHS | {"weight": 2.5, "prompts": "^m"}, COOKS), tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config, {}))
    assert load_config(path) == config
    assert [t.model for t in config.teachers] == [str(tmp_path / "m"), str(tmp_path / "c")]
    demo = yaml.safe_load(path.read_text()) | {"teacher": "t"}
    path.write_text(yaml.safe_dump(demo))
    assert load_config(path, ["teacher=null"]) == config


# --- which teachers a prompt has ---

ROUTED = config_with(MATHS | {"prompts": "^m"}, COOKS | {"prompts": "^c"}, ALL | {"prompts": "2$"})
TOP_K = {"loss": {"kind": "opd_topk"}}


@pytest.mark.parametrize(
    ("prompt_id", "names"),
    [("m1", ["maths"]), ("c1", ["cooks"]), ("m2", ["maths", "all"]), ("x2", ["all"]), ("x1", [])],
)
def test_a_prompt_has_the_teachers_whose_pattern_is_found_in_its_id(prompt_id, names):
    assert [t.name for t in ROUTED.teachers_of(prompt_id)] == names


def test_a_prompt_without_a_teacher_is_named():
    check_routes(ROUTED, [make_prompt("m1"), make_prompt("m2")], [make_prompt("c1")])
    for train, evaluation in ((["m1", "x1", "y1"], []), (["m1"], ["x1"])):
        with pytest.raises(ConfigError, match="prompt x1 has no teacher"):
            check_routes(ROUTED, [make_prompt(i) for i in train], [make_prompt(i) for i in evaluation])


@pytest.mark.parametrize("kind", ["opd_topk", "opd_full", "off_policy_fkd"])
def test_an_objective_that_needs_more_than_logprobs_needs_one_teacher_a_prompt(kind):
    config = config_with(MATHS, COOKS | {"prompts": "^c"}, loss={"kind": kind})
    check_routes(config, [make_prompt("m1")], [make_prompt("c1")])  # the first answers the held-out split
    with pytest.raises(ConfigError, match=f"prompt c1 has the teachers maths, cooks, but loss.kind={kind}"):
        check_routes(config, [make_prompt("m1"), make_prompt("c1")], [])


@pytest.mark.parametrize(
    "loss", [{"kind": "opd"}, {"kind": "off_policy_rkd"}, {"kind": "grpo", "kl_coef": 0.1}]
)
def test_objectives_of_logprobs_take_several(loss):
    config = config_with(MATHS, COOKS, loss=loss, rollout={"rollouts_per_prompt": 2})
    check_routes(config, [make_prompt("c1")], [])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.25, -0.25), None),
        ((2.0, 3.0), None),
        ((1.5, 0.7, -1.2), None),
        ((1.25, -0.5), "prompt c1: weights with a negative one must sum to 1, not 0.75"),
        ((1.25, -0.250002), "must sum to 1"),
        ((-0.25, 1.25), "prompt c1: its first teacher, maths, answers it, but has a negative weight"),
        ((-1.0,), "prompt c1: its one teacher, maths, has a negative weight"),
        ((2.0,), "weight=2 of teacher maths does nothing"),
    ],
)
def test_weights_of_a_prompt_s_teachers_count_and_fit_together(weights, said):
    teachers = [t | {"weight": w} for t, w in zip((MATHS, COOKS, ALL), weights, strict=False)]
    config = config_with(*teachers)
    if said is None:
        return check_routes(config, [make_prompt("c1")], [])
    with pytest.raises(ConfigError, match=said) as caught:
        check_routes(config, [make_prompt("c1")], [])
    assert "\n" not in str(caught.value)
    check_routes(config, [], [])  # the data are elsewhere


# --- what their scores become ---

values = st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=5)


@given(st.data(), st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(1, 6))
def test_the_reward_is_the_weighted_sum_of_the_log_ratios(data, weights, num_tokens):
    tokens = st.lists(st.floats(-20, 0, width=32), min_size=num_tokens, max_size=num_tokens)
    teachers = [np.asarray(data.draw(tokens), np.float32) for _ in weights]
    actor = np.asarray(data.draw(tokens), np.float32)
    combined = combine(weights, [scores_of(list(t), f"t{i}") for i, t in enumerate(teachers)])
    loss = config_with(MATHS).loss
    shares = np.asarray(weights) / sum(weights)
    expected = sum(
        share * sampled_advantage(t, actor, loss) for share, t in zip(shares, teachers, strict=True)
    )
    assert sampled_advantage(combined.teacher_logprobs, actor, loss) == pytest.approx(expected, abs=1e-4)
    assert combined.teacher_id == "+".join(f"t{i}" for i in range(len(weights)))
    assert combined.teacher_logprobs.dtype == np.float32 and combined.top_k is None
    assert combined.entropy == pytest.approx(-combined.teacher_logprobs, abs=1e-4)


@given(st.data(), st.floats(1.01, 4), st.integers(1, 6))
def test_a_teacher_and_its_base_extrapolate(data, strength, num_tokens):
    """G-OPD's r = lambda (log pi_T - log pi_base) + (log pi_base - log pi_old)."""
    tokens = st.lists(st.floats(-20, 0, width=32), min_size=num_tokens, max_size=num_tokens)
    teacher, base, actor = (np.asarray(data.draw(tokens), np.float32) for _ in range(3))
    combined = combine([strength, 1 - strength], [scores_of(list(v)) for v in (teacher, base)])
    reward = sampled_advantage(combined.teacher_logprobs, actor, config_with(MATHS).loss)
    expected = strength * (teacher.astype(float) - base) + (base.astype(float) - actor)
    assert reward == pytest.approx(expected, abs=1e-4) and combined.entropy is None


def test_one_teacher_s_scores_stay_as_they_are():
    scores = scores_of([-1.0, -2.0])
    assert combine([3.0], [scores]) is scores


def test_entropy_is_known_where_all_know_it():
    assert combine([1, 1], [scores_of([-1.0]), scores_of([-1.0], entropy=False)]).entropy is None


def test_a_group_that_one_teacher_cannot_read_has_failed():
    failed = FailedPrompt(prompt_id="p", reason="torn")
    teachers = config_with(MATHS, COOKS).teacher_models
    assert combine_results(teachers, [(scores_of([-1.0]),), failed]) is failed


# --- the pools ---


class FakePool:
    """Scores every token with one number; remembers what it was asked."""

    def __init__(self, name: str, logprob: float):
        self.name, self.logprob = name, logprob
        self.asked: list[str] = []
        self.weights: list[Weights | None] = []  # of each call

    async def score(
        self,
        groups: Sequence[TrajectoryGroup],
        for_selection: bool = False,
        weights: Weights | None = None,
    ) -> list[ScoreResult]:
        self.asked += [g.prompt.prompt_id for g in groups]
        self.weights.append(weights)
        return [
            tuple(
                TeacherScores(
                    trajectory_id=t.trajectory_id,
                    teacher_id=self.name,
                    teacher_logprobs=np.full(len(t.response_token_ids), self.logprob, np.float32),
                    top_k=None,
                )
                for t in g.trajectories
            )
            for g in groups
        ]

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int, temperature: float, arrived: Any
    ) -> list[list[Prediction]]:
        self.asked += [p.prompt_id for p in prompts]
        return [
            [Prediction(prompt_id=p.prompt_id, text=self.name, spans_s=())] * num_answers for p in prompts
        ]

    async def take_metrics(self) -> dict[str, float]:
        return {"teacher/replicas": self.logprob}


def teachers_of(config: Config) -> tuple[Teachers, list[FakePool]]:
    teachers = Teachers("video_opd/r", config)
    fakes = [FakePool(name, -1.0 - i) for i, name in enumerate(teachers.pools)]
    pools: dict[str, Any] = {fake.name: fake for fake in fakes}
    teachers.pools = pools
    return teachers, fakes


def test_each_teacher_scores_its_own_prompts_and_every_group_comes_back_in_its_place():
    config = config_with(
        MATHS | {"prompts": "^m"}, COOKS | {"prompts": "^c"}, ALL | {"prompts": "2$", "weight": 3.0}
    )
    teachers, (maths, cooks, everything) = teachers_of(config)
    groups = [make_group(i, lengths=(2, 3)).group for i in ("c1", "m2", "m1", "x2", "c2")]
    results = asyncio.run(teachers.score(groups))
    assert (maths.asked, cooks.asked, everything.asked) == (["m2", "m1"], ["c1", "c2"], ["m2", "x2", "c2"])
    ids, logprobs = [], []
    for group, result in zip(groups, results, strict=True):
        assert isinstance(result, tuple)
        assert [s.trajectory_id for s in result] == [t.trajectory_id for t in group.trajectories]
        ids.append(result[0].teacher_id)
        logprobs.append(float(result[1].teacher_logprobs[0]))
    assert ids == ["cooks", "maths+all", "maths", "all", "cooks+all"]
    assert logprobs == pytest.approx([-2, (-1 + 3 * -3) / 4, -1, -3, (-2 + 3 * -3) / 4])


def test_the_first_teacher_answers():
    teachers, (maths, cooks, everything) = teachers_of(ROUTED)
    prompts = [make_prompt(i) for i in ("c2", "m1", "x2")]
    answers = asyncio.run(teachers.predict(prompts, 2, 1.0))
    assert [[a.text for a in row] for row in answers if isinstance(row, list)] == [
        ["cooks"] * 2,
        ["maths"] * 2,
        ["all"] * 2,
    ]
    assert (maths.asked, cooks.asked, everything.asked) == (["m1"], ["c2"], ["x2"])


def test_the_metrics_of_each_have_its_name():
    teachers, _ = teachers_of(config_with(MATHS, COOKS))
    assert asyncio.run(teachers.take_metrics()) == {
        "teacher/maths/replicas": -1.0,
        "teacher/cooks/replicas": -2.0,
    }


def test_a_run_has_one_pool_several_or_none():
    assert create_teacher("r", parse_config(ALONE | {"loss": {"kind": "sft"}}, "test")) is None
    several = create_teacher("video_opd/r", config_with(MATHS, COOKS))
    assert isinstance(several, Teachers)
    assert [p.app for p in several.pools.values()] == [
        "video_opd/r/teacher/maths",
        "video_opd/r/teacher/cooks",
    ]
    one = create_teacher("video_opd/r", parse_config(MINIMAL, "test"))
    assert one is not None and not isinstance(one, Teachers) and one.app == "video_opd/r/teacher/t"


# --- what follows a teacher elsewhere ---


def test_kept_answers_are_those_of_the_prompt_s_first_teacher(tmp_path):
    for name in ("m", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    video = tmp_path / "v.mp4"
    video.write_bytes(b"frames")
    prompts = []
    for prompt_id in ("m1", "c1"):
        prompt = make_prompt(prompt_id, clip_id="clip")
        object.__setattr__(prompt.clip, "video_path", str(video))
        prompts.append(prompt)
    maths, cooks = (t | {"model": str(tmp_path / t["model"])} for t in (MATHS, COOKS))
    split = config_with(maths | {"prompts": "^m"}, cooks)
    keys = prompt_keys(prompts, split)
    assert keys[0] != keys[1], "the same clip and query, asked of two teachers"
    assert prompt_keys(prompts, config_with(maths, cooks)) == [keys[0]] * 2
    swapped = config_with(cooks | {"prompts": "^c", "name": "other"}, maths)
    assert prompt_keys(prompts, swapped) == keys, "neither names nor patterns decide an answer"
    assert settings_key(swapped) == settings_key(split)
    alone = parse_config(MINIMAL | {"teacher": maths["model"]}, "test")
    assert len(set(prompt_keys(prompts, alone))) == 1 and settings_key(alone) != settings_key(split)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 12),
    st.integers(1, 6),
)
def test_hidden_states_meet_the_head_of_their_own_teacher(runs, first, size):
    torch.manual_seed(0)
    heads = {True: torch.randn(5, 3), False: torch.randn(5, 2)}
    parts = [(torch.randn(n, heads[which].shape[1]), heads[which]) for n, which in runs]
    whole = torch.cat([states @ head.T for states, head in parts])
    assert torch.allclose(rows_of(parts, slice(first, first + size)), whole[first : first + size])
