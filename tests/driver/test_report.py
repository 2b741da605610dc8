"""The report of a run that is over is written, whatever has happened to the held-out clips since."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from driver.clock import PHASES
from driver.records.report import _example, _frames, embed, print_summary, write_report
from driver.records.step import record
from tests.fakes import make_prompt
from tests.video_opd.test_config import MINIMAL
from video_opd.config_data import VideoConfig
from video_opd.config_file import parse_config
from video_opd.grounding import blind_baselines
from video_opd.types import StepReport
from video_opd.video.frame_cache import FrameCache

SCORES = {"miou": 0.5, "r1@0.3": 1.0, "r1@0.5": 0.5, "r1@0.7": 0.0, "n": 2, "unparsed": 0}
PROMPTS = [make_prompt("a"), make_prompt("b", ((5.0, 2.0), (3.0, 3.0), (-1.0, 99.0)))]


@pytest.fixture
def summary():
    return {
        **dict.fromkeys(("teacher", "student_before", "student_after"), SCORES),
        "baselines": blind_baselines(PROMPTS, PROMPTS) | {"no_video": None},
        "odd_truth": {"reversed": 1},
        **{"steps": 1, "seed": 0, "loss": "opd", "seconds": {"total": 60.0, "start_up": 1.0}, "dropped": {}},
        "failed_eval": {},
        "video": VideoConfig(max_frame_tokens=256).budget,
        **{"tokens": {"rollout": 0, "scored": 0}, "teacher_calls": 0, "rollouts": 0, "suspended_rollouts": 0},
        "examples": {"student_before": {"a": "From 2.0 to 5.0 seconds.", "b": f"0 to {'9' * 400}"}},
    }


def test_a_report_is_written_though_held_out_clips_are_gone(tmp_path, summary):
    step = {"step": 0, "actors/miou": 0.5, "time/idle_s": 0.0, **{f"time/{name}_s": 1.0 for name in PHASES}}
    ratios = {f"learner/ratio_{quantile}": 1.0 for quantile in ("p01", "p50", "p99")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step | ratios) + "\n")
    config = parse_config(MINIMAL | {"video": {"cache_dir": str(tmp_path / "frames")}}, "test")
    shared = {"learner/computed_tokens": 25.0, "learner/separate_tokens": 100.0}
    write_report(tmp_path, config, PROMPTS, summary | {"tokens": summary["tokens"] | shared})
    html = (tmp_path / "report.html").read_text()
    assert html.count("frames, truth and answers") == len(PROMPTS)
    assert "Tokens computed: learner 25 of 100 (75% saved)" in html
    assert "video budget: 2 frames a second, 4 to 768, at most 8192 tokens, 256 a pair of frames" in html


def test_what_sequences_share_is_added_up_over_the_steps_and_told(tmp_path, summary, capsys):
    def run_of(teacher: dict[str, float]) -> Any:
        clock = SimpleNamespace(take_times=lambda: ({"update": 1.0}, {}, 1.0))
        others = {name: MagicMock() for name in ("actors", "curriculum", "gauges")}
        for part in others.values():
            part.take_metrics.return_value = {}
        asked = SimpleNamespace(take_metrics=AsyncMock(return_value=teacher))
        return SimpleNamespace(totals=Counter(), clock=clock, teacher=asked, **others)

    learner = {"learner/computed_tokens": 300.0, "learner/separate_tokens": 1000.0}
    teacher = {"teacher/computed_tokens": 500.0, "teacher/separate_tokens": 1000.0}
    several = {"teacher/a/computed_tokens": 0.0, "teacher/a/separate_tokens": 10.0}
    report = StepReport(step=0, policy_version=1, metrics=learner)
    lines = [(several, ", teacher/a 0 of 20 (100% saved)"), (teacher, ", teacher 1,000 of 2,000 (50% saved)")]
    for counted, told in (({}, ""), *lines):
        run = run_of(counted)
        for _ in range(2):
            asyncio.run(record(run, MagicMock(), report, [], []))
        tokens = {name: total for name, total in run.totals.items() if name.endswith("_tokens")}
        del tokens["rollout_tokens"]
        assert tokens == {name: 2 * value for name, value in (learner | counted).items()}
        print_summary(tmp_path, summary | {"tokens": tokens})
        line = f"tokens computed: learner 600 of 2,000 (70% saved){told}"
        assert line in capsys.readouterr().out.splitlines()
    print_summary(tmp_path, summary)
    assert "tokens computed" not in capsys.readouterr().out, "nobody counts them"


def test_the_reason_is_in_the_place_of_the_frames(tmp_path, summary):
    """Neither it nor a query nor odd spans, of answers or the truth, are more than the picture can show."""
    frames = _frames(FrameCache(VideoConfig(cache_dir=str(tmp_path))), PROMPTS[1])
    assert isinstance(frames, str) and "/nowhere/b.mp4" in frames
    prompt = replace(PROMPTS[1], query="what costs $\\5$?")
    figure = _example(prompt, f"$\\5$ {frames}", summary["examples"])
    assert embed(figure)
    strip, axes = figure.axes
    assert "/nowhere/b.mp4" in strip.texts[0].get_text().replace("\n", "") and strip.get_title()
    assert len(axes.patches) == 3, "the true spans; the answer has no end"


def test_the_printed_summary_counts_odd_truth(tmp_path, summary, capsys):
    print_summary(tmp_path, summary)
    out = capsys.readouterr().out
    assert "odd truth, scored as published: reversed 1" in out
    assert "video budget: 2 frames a second, 4 to 768, at most 8192 tokens, 256 a pair of frames\n" in out
    print_summary(tmp_path, summary | {"odd_truth": {}})
    assert "odd" not in capsys.readouterr().out
