"""Which prompts train on their ground truth, and what rewards are compared with."""

import asyncio
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from curriculum.curriculum import Curriculum
from curriculum.scheduler import Scheduler, observation
from driver import scoring
from driver.demonstrations import demonstrations, is_demonstrated
from driver.invariants import check_lag
from driver.progress import Progress
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.prompting import PromptEncoder
from video_opd.rewards import iou
from video_opd.types import ScoredGroup, TrajectoryGroup

PROMPTS = [make_prompt(f"p{i}") for i in range(200)]


def config_of(*loss: str) -> Config:
    return load_demo(["loss.kind=opd", "curriculum.kind=uniform", *(f"loss.{option}" for option in loss)])


class Clock:
    def __call__(self, phase: str) -> Any:
        return nullcontext()

    def count(self, phase: str, tokens: int) -> None: ...


def make_run(config: Config) -> Any:
    async def rollout(prompts):
        assert prompts, "no call without prompts"
        groups = [make_group(p.prompt_id).group for p in prompts]
        yield "reference", groups

    async def score(groups, for_selection):
        assert not for_selection
        trajectories = [t for g in groups for t in g.trajectories]
        scored = [make_group(t.prompt_id, [len(t.response_token_ids)]).scores for t in trajectories]
        return [
            (replace(s, trajectory_id=t.trajectory_id),) for (s,), t in zip(scored, trajectories, strict=True)
        ]

    gate: Any = SimpleNamespace(_config=config)
    return SimpleNamespace(
        config=config,
        step=3,
        clock=Clock(),
        totals=Counter(),
        progress=Progress(),
        rewards=[iou] if config.loss.needs.rewards else [],
        actors=SimpleNamespace(rollout=rollout),
        teacher=SimpleNamespace(score=score),
        curriculum=SimpleNamespace(route=lambda group: Curriculum.route(gate, group)),
    )


def rolled_out(run: Any, prompts: list, steps: list[int]) -> list[TrajectoryGroup]:
    async def collect() -> list[TrajectoryGroup]:
        every = [g async for _, results in scoring.roll_out(run, prompts, steps) for g in results]
        return [g for g in every if isinstance(g, TrajectoryGroup)]

    return asyncio.run(collect())


def test_a_share_of_the_prompts_of_every_step_is_drawn_by_seed_prompt_and_step():
    config = config_of("on_policy_frac=0.75")
    drawn = {step: {p.prompt_id for p in PROMPTS if is_demonstrated(config, p, step)} for step in range(20)}
    shares = [len(of_step) / len(PROMPTS) for of_step in drawn.values()]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03) and min(shares) > 0.1
    assert len({frozenset(of_step) for of_step in drawn.values()}) == 20
    other = config.model_copy(update={"seed": 1})
    assert {p.prompt_id for p in PROMPTS if is_demonstrated(other, p, 0)} != drawn[0]
    whole = config_of()
    assert not any(is_demonstrated(whole, p, 0) for p in PROMPTS)


def test_a_drawn_prompt_is_answered_by_its_truth_and_the_others_by_the_actors():
    run = make_run(config_of("on_policy_frac=0.5"))
    prompts, steps = PROMPTS[:8], [3, 3, 3, 4, 4, 4, 4, 5]
    groups = {g.prompt.prompt_id: g for g in rolled_out(run, prompts, steps)}
    assert groups.keys() == {p.prompt_id for p in prompts}
    truths = {p.prompt_id for p, s in zip(prompts, steps, strict=True) if is_demonstrated(run.config, p, s)}
    assert 0 < len(truths) < 8
    assert {i for i, g in groups.items() if not g.rollouts} == truths
    encoder = PromptEncoder(run.config.student, run.config.prompt, run.config.video)
    (truth,) = groups[min(truths)].trajectories
    assert truth.response_token_ids.tolist() == encoder.answer_ids([(2.0, 5.0)]).tolist()


def test_a_demonstration_is_no_rollout():
    config = config_of("on_policy_frac=0.5", "task_weight=0.5")
    run = make_run(config)
    groups = [*demonstrations(config, PROMPTS[:1], 3), make_group("p1").group]
    shown, sampled = asyncio.run(scoring.score(run, groups, groups))
    assert isinstance(shown, ScoredGroup) and isinstance(sampled, ScoredGroup)
    assert shown.rewards is None and sampled.rewards == (1.0,) and shown.scores
    assert check_lag([shown, sampled], 0, 0) == [0]
    scheduler = Scheduler([make_prompt("p0"), make_prompt("p1")], config)
    scheduler.next_prompts(2)
    scheduler.observe([observation(make_group("p0", (), suspended=[3]))], 0)
    scheduler.observe([observation(shown), observation(sampled)], 1)
    records = scheduler.records().to_pylist()
    assert [(r["num_rollouts"], r["last_step"], r["suspended"]) for r in records] == [
        (1, 1, True),
        (1, 1, False),
    ]
    assert scheduler.metrics()["curriculum/in_flight"] == 0


def test_the_gate_leaves_a_demonstration_active():
    config = load_demo(["loss.kind=opd", "loss.on_policy_frac=0.5", "curriculum.scc.gate=true"])
    run = make_run(config)
    (truth,) = demonstrations(config, PROMPTS[:1], 3)
    solved = make_group("p1").group
    assert run.curriculum.route(truth).trajectories and not run.curriculum.route(solved).trajectories


def rewarded(reward: float) -> ScoredGroup:
    group = make_group("p")
    return ScoredGroup(group=group.group, scores=group.scores, rewards=(reward,))


def test_the_baseline_is_the_mean_of_past_steps():
    run = make_run(config_of("task_weight=0.5", "baseline_decay=0.5"))
    seen = []
    for reward in (0.2, 0.8, 0.4):
        seen.append(scoring.reward_baseline(run, [rewarded(reward)]))
        scoring.count_rewards(run, [rewarded(reward)])
    assert seen == pytest.approx([0.2, 0.2, 0.5]) and run.progress.baseline == pytest.approx(0.45)


@pytest.mark.parametrize(
    "more", [["loss.kind=grpo"], ["loss.kind=opd", "loss.task_weight=1"], ["loss.kind=opd"]]
)
def test_groups_and_objectives_without_rewards_have_no_baseline(more):
    config = load_demo([*more, "loss.clamp=null", "curriculum.kind=uniform", "rollout.rollouts_per_prompt=2"])
    assert scoring.reward_baseline(make_run(config), [rewarded(0.5)]) is None
