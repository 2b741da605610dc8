"""benchmarks.baseline: the plain loop computes what the system computes, and the two are compared fairly."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.baseline import CASES, compare, medians
from benchmarks.cpu import Mark, between, cpu_seconds
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.types import EncodedPrompt, Prompt


def row(way: str, seconds: float, core_s: float, tokens: float = 7.0) -> dict:
    return {"case": "a", "way": way, "seconds": seconds, "core_s": core_s, "response_tokens": tokens}


def test_a_case_has_the_medians_of_its_runs_and_their_spread():
    runs = [row("plain", seconds, core_s) for seconds, core_s in ((1.0, 6.0), (9.0, 4.0), (2.0, 5.0))]
    spread = {"seconds_range": [1.0, 9.0], "core_s_range": [4.0, 6.0]}
    assert medians(runs) == row("plain", 2.0, 5.0) | spread


def test_each_lag_is_compared_with_the_plain_loop_of_its_case():
    rows = [row("plain", 2.0, 4.0), row("lag 0", 3.0, 6.0), row("lag 1", 1.0, 5.0)]
    result = compare([*rows, *({**r, "case": "b", "core_s": 1.0} for r in rows)])
    assert result["core_over_plain"] == {"a": [1.5, 1.25], "b": [1.0, 1.0]}
    assert result["seconds_over_plain"] == {"a": [1.5, 0.5], "b": [1.5, 0.5]}
    assert result["unequal"] == []


def test_responses_of_another_length_are_named():
    rows = [row("plain", 1.0, 1.0, 10.0), row("lag 0", 1.0, 1.0, 10.1), row("lag 1", 1.0, 1.0, 9.7)]
    assert compare(rows)["unequal"] == ["a"]
    assert compare([*rows[:2], row("lag 1", 1.0, 1.0, 10.0)])["unequal"] == []


def test_only_marks_inside_of_the_steps_count():
    marks = [Mark(n, 10.0 * n, {"driver": n**2, "learner": n}) for n in (1, 3, 4, 6, 8)]
    assert between(marks, 2, 7) == (3, 30.0, {"driver": 27, "learner": 3})


def test_cpu_time_of_child_processes_counts_after_their_end_too():
    before = cpu_seconds()
    burn = "import time\nwhile time.process_time() < 0.1: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert cpu_seconds()["driver"] - before["driver"] >= 0.09


def test_three_queries_share_a_video_where_it_comes_first():
    first = {name: load_demo(case.overrides).prompt.video_first for name, case in CASES.items()}
    assert [name for name, is_first in first.items() if is_first] == ["3 queries"]
    assert CASES["3 queries"].queries == CASES["3 queries, question first"].queries == 3


def test_cases_have_the_video_tokens_of_their_names():
    assert CASES["512 tokens"].video_tokens == 512
    assert {case.video_tokens for name, case in CASES.items() if name != "512 tokens"} == {12}


@pytest.mark.engine  # imports transformers
@pytest.mark.parametrize("video_first", ["false", "true"])
def test_the_plain_loop_has_the_prompts_and_the_loss_of_the_learner(tmp_path, video_first):
    import torch

    from benchmarks.clips import write_demo_clips, write_models
    from benchmarks.command import temporary_demo
    from benchmarks.plain_loop import PlainLoop
    from driver.command_line import prepare

    overrides = ["groups_per_step=3", "max_policy_lag=0", "rollout.prompts_per_call=3"]
    overrides += [f"prompt.video_first={video_first}"]
    overrides += [*write_models(tmp_path / "models"), *write_demo_clips(tmp_path / "clips", 3, scale=2)]
    overrides += [f"video.cache_dir={tmp_path / 'frames'}", "video.max_frames=8"]
    with temporary_demo(*overrides) as (config, _):
        prompts = [p for p in prepare(config).train.pool if isinstance(p, Prompt)]
    prompts[2] = replace(prompts[2], query="the red square and the blue bar")
    plain, rng = PlainLoop(config), np.random.default_rng(0)
    responses = [rng.integers(1, 300, n) for n in (5, 1, 3)]
    encoded, loss = learner_sees(config, prompts, responses)
    inputs = plain.encode(prompts)
    for ids, mask, prompt in zip(inputs["input_ids"], inputs["attention_mask"], encoded, strict=True):
        assert ids[mask.bool()].tolist() == prompt.token_ids.tolist()
    ours = plain.loss_sum(inputs, [torch.from_numpy(r) for r in responses])
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-5)


def learner_sees(
    config: Config, prompts: Sequence[Prompt], responses: Sequence[np.ndarray]
) -> tuple[list[EncodedPrompt], float]:
    """The prompts, and the loss, as a rank computes them, with the top-K of a teacher's replica."""
    import torch

    from learner.loss import ResponseTokens, loss_per_token
    from teacher_service.engine import top_k_of
    from video_opd.models.forward import ResponseLogits, collate, load_model
    from video_opd.models.policy import Policy
    from video_opd.models.prompting import PromptEncoder

    encoder = PromptEncoder(config.student, config.prompt, config.video)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    batch = collate(encoded, responses, encoder.tokenizer.pad_token_id)
    assert config.teacher
    with torch.no_grad():
        policy = Policy(config.learner_temperature, encoder.pad_ids, "cpu")
        student, teacher = (
            policy(ResponseLogits(load_model(path, "float32"))(batch))
            for path in (config.student, config.teacher)
        )
    top, zeros = top_k_of(teacher, config.loss.top_k), torch.zeros(len(batch.targets))
    top_k = torch.from_numpy(top.ids).long(), torch.from_numpy(top.logprobs)
    tokens = ResponseTokens(batch.targets, zeros, zeros, top_k)
    per_token, _ = loss_per_token(config.loss, student, tokens, slice(None))
    return encoded, float(per_token.sum())
