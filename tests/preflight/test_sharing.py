"""Tokens of a step computed once for sequences that share a clip: by hand, and in the plans of time."""

from typing import Any

import pytest

import launch
from preflight.sharing import describe_sharing, learner_shares, prompts_of_a_clip, teacher_shares
from preflight.time_plan import TimePlan
from tests.preflight.test_time_fit import PAPER, plan_of
from video_opd import ROOT

CHARADES = {"num_prompts": 12408, "prompts_a_video": 12408 / 5338}
WHOLE, OWN, RESPONSE = 8300, 128, 64  # tokens of a prompt, those after its video, and of a response
BY_VIDEO = "curriculum.group_by_video=true"
UNIFORM = "curriculum.kind=uniform"


def tokens_of(plan: TimePlan, role: str = "learner") -> tuple[int, int]:
    """Of one of 32 prompts: computed, separate."""
    shares = learner_shares if role == "learner" else teacher_shares
    shared = shares(plan.config, plan.train)
    assert shared.sequences % 32 == 0
    return round(shared.computed / 32), round(shared.separate / 32)


def test_rollouts_of_a_prompt_share_it_in_trees_of_micro_batch_and_tree_tokens():
    def tokens(*overrides: str) -> tuple[int, int]:
        return tokens_of(plan_of("rollout.rollouts_per_prompt=8", "learner.tree_tokens=null", *overrides))

    separate = 8 * (WHOLE + RESPONSE)
    assert tokens() == (WHOLE + 8 * RESPONSE, separate)
    assert tokens("learner.micro_batch=1") == (separate, separate)
    assert tokens("learner.micro_batch=5") == (2 * WHOLE + 8 * RESPONSE, separate), "two trees"
    assert tokens("learner.micro_batch=32") == tokens()
    most = f"learner.tree_tokens={WHOLE + 3 * RESPONSE + 63}"
    assert tokens(most) == (3 * WHOLE + 8 * RESPONSE, separate), "3, 3 and 2 of them fit"
    assert tokens("learner.tree_tokens=1") == (separate, separate)
    assert tokens("loss.kind=sft", UNIFORM, "rollout.num_actors=0")[1] == WHOLE + RESPONSE


def test_prompts_of_a_video_share_it_where_they_are_in_one_step_and_it_comes_first():
    def tokens(*overrides: str, number: float = 4) -> tuple[int, int]:
        plan = plan_of(UNIFORM, *overrides, num_prompts=1000, prompts_a_video=number)
        return tokens_of(plan)

    separate = WHOLE + RESPONSE
    assert tokens() == tokens("prompt.video_first=false", BY_VIDEO) == (separate, separate)
    assert tokens(BY_VIDEO) == ((WHOLE - OWN) / 4 + OWN + RESPONSE, separate)
    assert tokens(BY_VIDEO, number=1000) == (round((WHOLE - OWN) / 8 + OWN + RESPONSE), separate)
    assert tokens(BY_VIDEO, "learner.micro_batch=1") == (separate, separate)


def test_a_round_that_selects_some_prompts_has_few_of_a_video():
    """Of 2 prompts of a video a share f is selected: 2 f prompts of 1 - (1 - f)^2 videos."""

    def prompts(*overrides: str, **pool: Any) -> float:
        plan = plan_of(*overrides, **pool)
        return prompts_of_a_clip(plan.config, plan.train)

    two = {"num_prompts": 5000, "prompts_a_video": 2.0}
    assert prompts(BY_VIDEO, **two) == pytest.approx(2 * 0.5 / (1 - 0.5**2))
    assert prompts(BY_VIDEO, UNIFORM, **two) == prompts(BY_VIDEO, "curriculum.num_selected=null", **two) == 2
    by_video = BY_VIDEO, "curriculum.select_by=video"
    assert prompts(*by_video, **two) == 2 and prompts(by_video[1], **two) == 1
    asked = prompts(*by_video, "curriculum.pool_sample=3000", **two)
    assert asked == pytest.approx(2 * 0.6 / (1 - 0.4**2)), "the prompts that are asked are at random"
    assert prompts(**two) == prompts(BY_VIDEO) == 1
    assert prompts(BY_VIDEO, UNIFORM, num_prompts=9000, prompts_a_video=145.0) == 32, "a step has no more"
    of_charades = prompts(BY_VIDEO, **CHARADES)
    assert of_charades == pytest.approx(1.15, abs=0.005)
    computed, separate = tokens_of(plan_of(BY_VIDEO, **CHARADES))
    assert round(1 - computed / separate, 2) == 0.13, "what the configs say of it"
    for config in (ROOT / "configs").glob("qwen*.yaml"):
        assert "group_by_video: true would save 13 % of the tokens" in config.read_text()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_teacher_shares_within_a_call(engine):
    def tokens(*overrides: str) -> tuple[int, int]:
        pool = {"num_prompts": 1000, "prompts_a_video": 8.0}
        overrides = (UNIFORM, BY_VIDEO, f"teacher_pool.engine={engine}", *overrides)
        return tokens_of(plan_of(*overrides, **pool), "teacher")

    calls_of_4 = (WHOLE - OWN) / 4 + OWN + RESPONSE
    assert tokens("rollout.prompts_per_result=4") == (calls_of_4, WHOLE + RESPONSE)
    assert tokens("rollout.prompts_per_result=1") == (WHOLE + RESPONSE, WHOLE + RESPONSE)
    few = tokens("rollout.prompts_per_result=4", "teacher_pool.micro_batch=2")
    assert few[0] == ((WHOLE - OWN) / 2 + OWN + RESPONSE if engine == "transformers" else calls_of_4)
    rollouts = tokens("rollout.prompts_per_result=4", "rollout.rollouts_per_prompt=2")[0]
    own = OWN if engine == "vllm" else 2 * OWN
    assert rollouts == (WHOLE - OWN) / 4 + own + 2 * RESPONSE


def test_the_time_plan_counts_what_is_shared():
    def seconds(*overrides: str, **pool: Any) -> dict[str, float]:
        plan = plan_of("learner.tree_tokens=null", "teacher_pool.engine=transformers", *overrides, **pool)
        return {name: phase.num_units * sum(phase.terms.values()) for name, phase in plan.phases.items()}

    rollouts, alone = "rollout.rollouts_per_prompt=8", seconds("learner.micro_batch=8")
    together = seconds(rollouts, "learner.micro_batch=8")
    separate = seconds(rollouts, "learner.micro_batch=1", "teacher_pool.micro_batch=1")
    for phase in ("score", "update"):
        assert together[phase] < 0.2 * separate[phase] and together[phase] < 1.4 * alone[phase]
        assert separate[phase] == pytest.approx(8 * alone[phase], rel=0.01)
    four = {"num_prompts": 1000, "prompts_a_video": 4.0}
    by_video = seconds(UNIFORM, BY_VIDEO, **four)
    for phase in ("rollout", "score", "update"):
        assert by_video[phase] < 0.5 * seconds(UNIFORM, **four)[phase], phase
    last = seconds(UNIFORM, BY_VIDEO, "prompt.video_first=false", **four)
    assert by_video["rollout"] < last["rollout"] < alone["rollout"], "the tower alone"


def test_a_pass_takes_as_many_whole_trees_as_fit():
    def waits(*overrides: str) -> float:
        slow = "learner.zero_stage=2", "rollout.rollouts_per_prompt=4", "learner.micro_batch=8", *overrides
        phase = plan_of(*slow).phases["update"]
        return phase.num_units * phase.terms["waits for links"]

    of_32 = waits("learner.tree_tokens=null")
    assert waits(f"learner.tree_tokens={WHOLE + 4 * RESPONSE}") == pytest.approx(2 * of_32), "one tree a pass"


def test_the_words_say_what_is_assumed(capsys, monkeypatch, tmp_path):
    plan = plan_of(BY_VIDEO, UNIFORM, "rollout.rollouts_per_prompt=2", **CHARADES)
    assert describe_sharing(plan.config, plan.train) == (
        "shared    in a step 2.32 prompts of a clip, 2 responses to each; tokens computed: "
        "learner 124,789 of 535,296 (77% saved), teacher 120,693 of 535,296 (77% saved)"
    )
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config", str(ROOT / "configs" / PAPER), "--dry-run"]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("shared ")]
    assert (
        "each prompt has its own clip, one response to each" in line and "learner 403,456 of 403,456" in line
    )
