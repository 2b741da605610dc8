"""Several sources: their shares by brute force, without replacement in a source, resuming, ids and styles."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.answers import student_prompt_keys
from curriculum.mixture import Mixture, apportion
from curriculum.scheduler import Scheduler
from driver.records.step import source_metrics
from preflight.inputs import check_source_weights, fit_lengths
from tests.curriculum.test_scheduler import issue, issue_and_train, make_config, train
from tests.fakes import make_clip, make_prompt
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_curriculum import CurriculumConfig
from video_opd.config_data import DataConfig
from video_opd.config_file import dump_config, load_config, load_demo
from video_opd.datasets import read_sources
from video_opd.errors import CheckpointError, ConfigError, DataError
from video_opd.models.lengths import PromptLengths
from video_opd.models.prompting import PromptEncoder
from video_opd.types import FailedPrompt, Prompt

SPLIT = {"annotations": "a", "videos": "v"}


def with_weights(config: Config, weights: Mapping[str, float | None], **of_all) -> Config:
    train = [{**SPLIT, "name": name, "weight": weight, **of_all} for name, weight in weights.items()]
    return config.model_copy(update={"data": DataConfig.model_validate({"train": train, "eval": SPLIT})})


def pool_of(sizes: Mapping[str, int]) -> list[Prompt]:
    ids = [(name, f"{name}/{i}") for name, size in sizes.items() for i in range(size)]
    return [replace(make_prompt(prompt_id), source=name) for name, prompt_id in ids]


def source_of(prompt_id: str) -> str:
    return prompt_id.partition("/")[0]


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    before=st.integers(0, 30),
    n=st.integers(0, 30),
    data=st.data(),
)
def test_draws_are_webster_s_one_by_one(weights, before, n, data):
    """Brute force in exact arithmetic: each draw goes to the smallest (k - 1/2) / weight that has room."""

    def draw_one_by_one(times: int, drawn: list[int], room: list[int]) -> list[int]:
        counts = [0] * len(weights)
        for _ in range(times):
            keys = [
                (Fraction(2 * (d + c) + 1, 2 * w), s)
                for s, (d, c, w, r) in enumerate(zip(drawn, counts, weights, room, strict=True))
                if c < r
            ]
            counts[min(keys)[1]] += 1
        return counts

    endless, none = [before + n] * len(weights), [0] * len(weights)
    drawn = draw_one_by_one(before, none, endless)
    room = [data.draw(st.integers(0, 30)) for _ in weights]
    room[0] += max(0, n - sum(room))
    found = apportion(n, np.array(weights, float), np.array(drawn), np.array(room))
    assert found.tolist() == draw_one_by_one(n, drawn, room)


@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_passes_have_the_shares_and_a_source_repeats_nothing_before_all_of_it_came(weights, sizes, seed):
    names, rng = "abc"[: len(weights)], np.random.default_rng(seed)
    of = dict(zip(names, sizes, strict=False))
    sources = [name for name in names for _ in range(of[name])]
    mixture = Mixture(sources, dict(zip(names, map(float, weights), strict=True)))
    drawn = [i for _ in range(6) for i in mixture.next_pass(np.arange(len(sources)), rng.permutation)]
    assert len(drawn) == 6 * len(sources)
    for name, weight in zip(names, weights, strict=True):
        own = [i for i in drawn if sources[i] == name]
        share = len(drawn) * weight / sum(weights)
        assert abs(len(own) - share) <= (0.5 if len(weights) == 2 else 1) + 1e-9
        for first in range(0, len(own), of[name]):
            one_pass = own[first : first + of[name]]
            assert len(set(one_pass)) == len(one_pass)
            assert len(one_pass) < of[name] or set(one_pass) == {i for i in drawn if sources[i] == name}


def test_a_source_of_a_tiny_weight_comes_after_enough_passes():
    mixture, rng = Mixture(["a"] * 9 + ["b"], {"a": 99.0, "b": 1.0}), np.random.default_rng(0)
    passes = [mixture.next_pass(np.arange(10), rng.permutation).tolist() for _ in range(20)]
    assert [one.count(9) for one in passes].count(1) == 2 == sum(one.count(9) for one in passes)


@pytest.mark.parametrize("seed", range(5))
def test_a_uniform_curriculum_issues_the_weights_not_the_sizes(seed):
    config = with_weights(make_config(seed), {"few": 3.0, "many": 1.0})
    issued = issue_and_train(Scheduler(pool_of({"few": 6, "many": 18}), config), 1, 240)
    for first in range(0, 240, 24):
        assert Counter(map(source_of, issued[first : first + 24])) == {"few": 18, "many": 6}
    assert set(Counter(issued).values()) == {30, 180 // 6, 60 // 18, 60 // 18 + 1}
    other = issue_and_train(Scheduler(pool_of({"few": 6, "many": 18}), config), 1, 240)
    assert issued == other, "seeded"


def test_whole_videos_may_be_drawn_by_weight():
    config = with_weights(make_config(groups_per_step=4, group_by_video=True), {"few": 3.0, "many": 1.0})
    pool = [
        replace(p, clip=make_clip(f"{p.source}{i // 2}"))
        for i, p in enumerate(pool_of({"few": 8, "many": 24}))
    ]
    scheduler, video, counts = Scheduler(pool, config), {p.prompt_id: p.clip.clip_id for p in pool}, Counter()
    for _ in range(64):
        issued = issue(scheduler, 4)
        train(scheduler, issued)
        assert set(Counter(video[i] for i in issued).values()) == {2}
        counts.update(map(source_of, issued))
    assert abs(counts["few"] / counts.total() - 0.75) < 0.02


def test_without_weights_the_pool_is_the_union():
    sizes = {"few": 2, "many": 8}
    config = with_weights(make_config(), {"few": None, "many": None})
    issued = issue_and_train(Scheduler(pool_of(sizes), config), 1, 30)
    assert issued == issue_and_train(Scheduler(pool_of(sizes), make_config()), 1, 30)
    assert set(Counter(issued).values()) == {3}


def test_a_random_selection_has_the_shares_and_fills_up_what_a_source_lacks():
    options = {"kind": "tvdf", "trpv": False, "dbtp": False, "num_selected": 12}
    for few, selected in ((10, {"few": 9, "many": 3}), (5, {"few": 5, "many": 7})):
        config = with_weights(make_config(groups_per_step=4, **options), {"few": 3.0, "many": 1.0})
        scheduler = Scheduler(pool_of({"few": few, "many": 20}), config)
        scheduler.start_round(None, 0)
        issued = issue_and_train(scheduler, 4, 3)
        assert Counter(map(source_of, issued)) == selected and len(set(issued)) == 12


@pytest.mark.parametrize("stop", [0, 1, 7, 23, 40])
def test_a_resumed_mixture_issues_what_an_uninterrupted_one_does(stop):
    config, pool = with_weights(make_config(), {"a": 1.0, "b": 2.0}), pool_of({"a": 3, "b": 4})
    whole = Scheduler(pool, config)
    expected = issue_and_train(whole, 1, 60)
    first = Scheduler(pool, config)
    issued = issue_and_train(first, 1, stop)
    state = first.state_dict()
    state |= json.loads(json.dumps({key: value for key, value in state.items() if key != "records"}))
    second = Scheduler(pool, config)
    second.load_state_dict(state)
    assert issued + issue_and_train(second, 1, 60 - stop) == expected


def test_a_checkpoint_of_other_weights_is_refused():
    pool = pool_of({"a": 2, "b": 2})
    state = Scheduler(pool, with_weights(make_config(), {"a": 1.0, "b": 2.0})).state_dict()
    for weights in ({"a": 1.0, "b": 3.0}, {"a": None, "b": None}):
        with pytest.raises(CheckpointError, match="resume with the curriculum"):
            Scheduler(pool, with_weights(make_config(), weights)).load_state_dict(state)
    plain = Scheduler(pool, make_config()).state_dict()
    assert "mixture" not in plain and "weights" not in plain["settings"]  # checkpoints of one source: as ever


def test_a_source_whose_prompts_all_fail_gives_its_share_to_the_others():
    pool = [*pool_of({"a": 4}), *(FailedPrompt(prompt_id=f"b/{i}", reason="gone") for i in range(4))]
    issued = issue_and_train(Scheduler(pool, with_weights(make_config(), {"a": 1.0, "b": 9.0})), 1, 8)
    assert set(Counter(issued).values()) == {2}


def test_metrics_are_by_source():
    a, b = (replace(make_prompt(f"{s}/1"), source=s) for s in "ab")
    rollouts = [(a, 0.5), (a, 1.0), (b, 0.25)]
    shares = {"sources/a/share": 0.75, "sources/b/share": 0.25}
    assert source_metrics([a, a, a, b], rollouts) == shares | {"sources/a/miou": 0.75, "sources/b/miou": 0.25}
    assert source_metrics([make_prompt("x")], [(make_prompt("x"), 0.5)]) == {}


CHOICES = {"dbtp": False, "kind": "tvdf"}


@pytest.mark.parametrize(
    ("options", "random"),
    [
        ({}, True),
        ({"pool_sample": 5}, True),  # which uniform does not use
        (CHOICES, True),
        ({"kind": "tvdf", "sampler": "uniform"}, True),
        ({"kind": "tvdf"}, False),
        (CHOICES | {"select_by": "video"}, False),
        (CHOICES | {"pool_sample": 5}, False),
        ({"kind": "scc"}, False),
        ({"kind": "difficulty", "num_selected": 5}, False),
    ],
)
def test_weights_are_for_what_is_drawn_at_random(options, random):
    config = with_weights(make_config(), {"a": 1.0})
    tree = config.model_dump() | {
        "curriculum": CurriculumConfig(**options).model_dump(),
        "groups_per_step": 4,
    }
    if random:
        Config.model_validate(tree)
    else:
        with pytest.raises(
            ValueError, match=r"weights of data[.]train need prompts that are drawn at random"
        ):
            Config.model_validate(tree)


def test_a_source_too_small_for_its_share_of_the_prompts_in_flight_is_refused():
    config = with_weights(make_config(groups_per_step=8), {"few": 3.0, "many": 1.0})
    check_source_weights(config, pool_of({"few": 6, "many": 2}))
    with pytest.raises(
        ConfigError, match=r"source few of data[.]train has 5 prompts for a share of 75% of 8 in"
    ):
        check_source_weights(config, pool_of({"few": 5, "many": 20}))


@pytest.fixture(scope="module")
def mixed(split_folder, tmp_path_factory) -> Config:
    """Two sources of the same videos, the second with a prompt of its own; and a too long query."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = (split_folder / "annotations.txt").read_text().splitlines()
    names = {"lengths": str(split_folder / "lengths.csv"), "videos": str(split_folder / "videos")}
    for name, part in (("a", lines[:3]), ("b", [*lines[1:4], lines[0] + " and" * 400])):
        (folder / f"{name}.txt").write_text("\n".join(part))
    train = [
        {"name": name, "annotations": str(folder / f"{name}.txt"), **names, **own}
        for name, own in (("a", {}), ("b", {"prompt": "time_r1", "too_long": "drop"}))
    ]
    models = [f"{m}={ROOT / 'demo' / 'models' / m}" for m in ("student", "teacher")]
    config = load_demo([*models, "groups_per_step=2", "max_policy_lag=0"])
    held_out = {key: value for key, value in train[0].items() if key != "name"}
    data = DataConfig.model_validate({"train": train, "eval": held_out})
    return config.model_copy(update={"data": data})


def test_ids_are_of_their_sources_and_each_prompt_is_asked_in_its_style(mixed):
    prompts = read_sources(mixed.data, mixed.video, 32).prompts
    ids = [p.prompt_id for p in prompts]
    assert len(set(ids)) == 7 and [source_of(i) for i in ids] == ["a"] * 3 + ["b"] * 4
    own = [i.partition("/")[2] for i in ids]
    assert len(set(own)) < 7, "unique only by their sources"
    styled = mixed.prompt.model_validate({"style": "time_r1"})
    encoder, other = (PromptEncoder(mixed.student, c, mixed.video) for c in (mixed.prompt, styled))
    for prompt in prompts[:6]:
        plain, expected = replace(prompt, style=None), other if prompt.source == "b" else encoder
        assert encoder.token_ids(prompt).tolist() == expected.token_ids(plain).tolist()
    assert (
        encoder.token_ids(prompts[4]).tolist() != encoder.token_ids(replace(prompts[4], style=None)).tolist()
    )
    lengths = PromptLengths(mixed.student, "qwen3_vl", 32, mixed.prompt)
    assert lengths.of(prompts) == [len(encoder.token_ids(p)) for p in prompts]
    answers = encoder.answer_ids([(1.0, 2.5)], "time_r1"), other.answer_ids([(1.0, 2.5)])
    assert answers[0].tolist() == answers[1].tolist() != encoder.answer_ids([(1.0, 2.5)]).tolist()
    assert not mixed.video_first
    keys = student_prompt_keys([prompts[1], replace(prompts[1], style="time_r1")], mixed)
    assert keys[0] != keys[1]


def test_too_long_counts_as_its_source_says(mixed):
    split = read_sources(mixed.data, mixed.video, 32)
    lengths = PromptLengths(mixed.student, "qwen3_vl", 32, mixed.prompt)
    config = mixed.model_copy(update={"rollout": mixed.rollout.model_copy(update={"max_model_len": 400})})
    assert list(fit_lengths(config, "train", split, lengths)[0].failed) == [split.pool[-1].prompt_id]
    train = [source.model_copy(update={"too_long": "error"}) for source in mixed.data.sources.values()]
    data = DataConfig(train=tuple(train), eval=mixed.data.eval)
    with pytest.raises(DataError, match=r"prompt b/.*too_long=drop leaves them out"):
        fit_lengths(config.model_copy(update={"data": data}), "train", split, lengths)


def test_a_config_with_sources_is_written_and_read_back_and_its_bad_keys_are_named(mixed, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(mixed, {}))
    assert load_config(path) == mixed
    for old, new, named in (
        ("name: b", "name: a", "each a name of its own"),
        ("weight: null", "weight: 1", "give all one, or none"),
        ("weight: null", "weight: 0", "data.train.0.weight=0: Input should be greater"),
        ("weight: null", "wieght: 1", "unknown key data.train.0.wieght; did you mean data.train.N.weight?"),
        ("prompt: time_r1", "prompt: time", "data.train.1.prompt='time': Input should be 'timelens'"),
    ):
        path.write_text(dump_config(mixed, {}).replace(old, new, 1))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert named in str(caught.value) and "\n" not in str(caught.value)
