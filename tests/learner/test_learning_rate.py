"""The learning rate of each step."""

import math

import pytest

from video_opd.config_file import load_demo


@pytest.mark.engine  # imports transformers
def test_it_rises_over_the_warm_up_and_then_falls_to_its_last_share():
    from learner.engine import learning_rate

    schedule = ("num_steps=10", "learner.lr=2", "learner.warmup_frac=0.3", "learner.final_lr_frac=0.5")
    config = load_demo(schedule)
    rates = [learning_rate(step, config) for step in range(11)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[3:] == pytest.approx([2.0 - n / 7 for n in range(8)])
    falling = load_demo((*schedule, "learner.lr_decay=cosine"))
    rates = [learning_rate(step, falling) for step in range(11)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[3:] == pytest.approx([1.5 + 0.5 * math.cos(math.pi * n / 7) for n in range(8)])
    constant = load_demo(("num_steps=10", "learner.warmup_frac=0", "learner.final_lr_frac=1", "learner.lr=2"))
    assert {learning_rate(step, constant) for step in range(10)} == {2.0}
