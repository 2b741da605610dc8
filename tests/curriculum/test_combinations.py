"""Every curriculum with every objective: a step of it works, or the config refuses it in one line."""

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from curriculum.curriculum import Curriculum
from curriculum.scheduler import Scheduler
from curriculum.tvdf import SAMPLERS
from driver.scoring import score
from learner.batching import plan_update
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.config_learner import OBJECTIVES
from video_opd.errors import ConfigError
from video_opd.rewards import load_rewards
from video_opd.types import TrajectoryGroup

SOLVED = [True, False, False]  # of a prompt's rollouts
SELECTING = [f"sampler={s}" for s in SAMPLERS] + ["dbtp=false", "trpv=false", "trpv=false dbtp=false"]
BY_KL = [f"disagreement=reverse_kl {more}" for more in ("", "trpv=false", "sampler=bbds", "sampler=dsus")]
KINDS = {
    "uniform": ["", "scc.gate=true"],
    "difficulty": ["num_selected=6", "num_selected=6 scc.gate=true"],
    "tvdf": [*SELECTING, *BY_KL, "scc.gate=true"],
    "scc": [
        *("", "trpv=false", "sampler=bbds", "scc.anchor_frac=0"),
        *("scc.schedule=false", "scc.gate=false", "scc.schedule=false scc.gate=false"),
    ],
}
REFUSED = {  # with the gate
    "grpo": "the gate suspends the rollouts that loss.kind=grpo rewards: set scc.gate=false",
    "sft": "the gate suspends rollouts, loss.kind=sft has none: set scc.gate=false",
    "off_policy_rkd": "the gate suspends rollouts, loss.kind=off_policy_rkd has none",
    "off_policy_fkd": "the gate suspends rollouts, loss.kind=off_policy_fkd has none",
}


BY_KL_ALONE = "curriculum.trpv=false", "curriculum.disagreement=reverse_kl"


def is_gated(kind: str, options: str) -> bool:
    return "gate=true" in options or (kind == "scc" and "gate=false" not in options)


def config_of(kind: str, loss: str, options: str = "", *more: str) -> Config:
    chosen = [f"curriculum.{option}" for option in (f"kind={kind}", *options.split())]
    sizes = ["rollout.rollouts_per_prompt=3", "groups_per_step=2", "max_policy_lag=0", "num_steps=8"]
    return load_demo([*chosen, f"loss={{kind: {loss}}}", *sizes, *more])


class Teacher:
    """Scores every trajectory that it is sent."""

    async def score(self, groups: list[TrajectoryGroup], for_selection: bool) -> list[tuple]:
        scored = [make_group(g.prompt.prompt_id, [3] * len(SOLVED)) for g in groups]
        by_id = [{s.trajectory_id: s for s in of.scores} for of in scored]
        pairs = zip(groups, by_id, strict=True)
        return [tuple(scores[t.trajectory_id] for t in g.trajectories) for g, scores in pairs]


def rolled_out(prompt: Any, num_responses: int) -> TrajectoryGroup:
    """Responses of three tokens, of which SOLVED says how good they are."""
    group = make_group(prompt.prompt_id, [3] * num_responses).group
    spans = [prompt.answer_spans_s[0] if solved else (8.0, 9.0) for solved in SOLVED]
    changes = zip(group.trajectories, spans, strict=False)
    rollouts = tuple(replace(t, predicted_spans_s=(span,)) for t, span in changes)
    return TrajectoryGroup(prompt=prompt, trajectories=rollouts)


def one_step(config: Config) -> Any:
    """The plan of the update after one selection: scheduler, gate, scores, rewards and batching are real."""
    curriculum, needs = config.curriculum, config.loss.needs
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(20)], config)
    if curriculum.asks_teacher:
        scheduler.validate(np.full(20, 0.9))
    if scheduler.next_selection() == 0:
        sigma = np.tile([0.9, 0.1, 0.5, 0.0], 5)
        divergence = np.arange(20.0) if curriculum.scores_student else None
        scheduler.start_round(sigma if curriculum.asks_student else None, 0, None, divergence)
    prompts = scheduler.next_prompts(config.groups_per_step)
    groups = [rolled_out(p, len(SOLVED) if needs.rollouts else 1) for p in prompts]
    gate: Any = SimpleNamespace(_config=config)
    run: Any = SimpleNamespace(
        config=config,
        curriculum=SimpleNamespace(route=lambda group: Curriculum.route(gate, group)),
        teacher=Teacher(),
        rewards=load_rewards(config.loss.rewards) if needs.rewards else [],
        clock=Clock(),
        totals=Counter(),
    )
    scored: Any = asyncio.run(score(run, groups, groups))
    learner = config.learner.model_copy(update={"micro_batch": 8})
    sequences = (room := config.schedule_room) and room.num_sequences(0)
    return plan_update(scored, config.loss, learner, 0, lambda _: np.zeros(5, np.int32), 99, sequences)


class Clock:
    def __call__(self, phase: str) -> "Clock":
        return self

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def count(self, phase: str, tokens: int) -> None: ...


@pytest.mark.parametrize(("kind", "loss"), [*product(KINDS, OBJECTIVES)])
def test_a_curriculum_and_an_objective_work_together_or_are_refused_in_one_line(kind, loss):
    for options in KINDS[kind]:
        gated = is_gated(kind, options)
        if gated and (refused := REFUSED.get(loss)):
            with pytest.raises(ConfigError, match=refused) as caught:
                config_of(kind, loss, options)
            assert "\n" not in str(caught.value)
            continue
        config = config_of(kind, loss, options)
        needs, plan = config.loss.needs, one_step(config)
        responses = config.groups_per_step * (len(SOLVED) if needs.rollouts else 1)
        trained = responses - (config.groups_per_step if gated else 0)
        (rows,) = plan.micro_batches
        assert (len(rows), plan.denominator) == (trained, 3 * responses), "suspended ones count as tokens"
        advantages = [float(row.signal.advantage[0]) for row in rows]
        if loss == "grpo":
            good = [
                float(row.signal.advantage[0])
                for row in rows
                if row.trajectory.predicted_spans_s != ((8, 9),)
            ]
            assert abs(sum(advantages)) < 1e-5 and len(good) == 2 and min(good) > 0
        else:
            assert any(advantages) == (loss == "opd")


@pytest.mark.parametrize(
    ("kind", "loss", "more", "message"),
    [
        ("tvdf", "sft", ["rollout.num_actors=0"], "rollout.num_actors=0, but .*kind=tvdf asks the student"),
        ("tvdf", "sft", ["teacher=null"], "loss.kind=sft with curriculum.kind=tvdf needs a teacher"),
        ("tvdf", "grpo", ["teacher=null"], "loss.kind=grpo with curriculum.kind=tvdf needs a teacher"),
        ("scc", "opd", ["rollout.num_actors=0"], "asks the student"),
        ("difficulty", "sft", ["rollout.num_actors=0"], "kind=difficulty asks the student: set 1 or more"),
        (
            "difficulty",
            "opd",
            ["teacher=null"],
            "loss.kind=opd with curriculum.kind=difficulty needs a teach",
        ),
        ("tvdf", "grpo", [*BY_KL_ALONE, "teacher=null"], "needs a teacher"),
        ("tvdf", "sft", [*BY_KL_ALONE, "rollout.num_actors=0"], "asks the student: set 1 or more"),
        ("uniform", "off_policy_rkd", ["teacher=null"], "needs a teacher"),
        ("uniform", "grpo", ["rollout.rollouts_per_prompt=1"], "set rollout.rollouts_per_prompt >= 2"),
    ],
)
def test_what_a_combination_lacks_is_one_line(kind, loss, more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(kind, loss, "num_selected=6", *more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kind=difficulty", "kind=difficulty draws num_selected prompts of the pool: set it"),
        ("kind=tvdf sampler=gwds disagreement=reverse_kl", "sampler=gwds draws around a difference of IoUs"),
        (
            "kind=tvdf dbtp=false disagreement=reverse_kl",
            "disagreement=reverse_kl is for kind=tvdf with dbtp",
        ),
        ("kind=scc disagreement=reverse_kl", "disagreement=reverse_kl is for kind=tvdf with dbtp"),
        ("kind=difficulty num_selected=6 difficulty_std=0", "difficulty_std"),
    ],
)
def test_options_that_do_nothing_together_are_one_line(options, message):
    kind, *others = options.split()
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(kind.removeprefix("kind="), "opd", " ".join(others))
    assert "\n" not in str(caught.value)


def test_who_is_asked():
    """(the teacher answers, the student answers, the teacher scores it, the run has a teacher)"""

    def asked(kind: str, loss: str, options: str = "", *more: str) -> tuple[bool, ...]:
        config = config_of(kind, loss, options, *more)
        of = config.curriculum
        return of.asks_teacher, of.asks_student, of.scores_student, config.needs_teacher

    assert asked("difficulty", "grpo", "num_selected=6", "teacher=null") == (False, True, False, False)
    assert asked("difficulty", "opd", "num_selected=6") == (False, True, False, True)
    assert asked("tvdf", "grpo", "trpv=false disagreement=reverse_kl") == (False, True, True, True)
    assert asked("tvdf", "opd", "disagreement=reverse_kl") == (True, True, True, True)
    assert asked("tvdf", "opd", "trpv=false") == (True, True, False, True)
    assert asked("tvdf", "grpo", "trpv=false sampler=uniform", "teacher=null") == (False, True, False, False)


@pytest.mark.parametrize("loss", ["sft", "off_policy_rkd", "off_policy_fkd"])
def test_without_actors_prompts_can_be_drawn_at_random(loss):
    config = config_of("tvdf", loss, "dbtp=false", "rollout.num_actors=0")
    assert not config.curriculum.asks_student and len(one_step(config).micro_batches[0]) == 2
