"""python -m curriculum show, and the report: why a prompt was selected or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curriculum.__main__ import main
from curriculum.scheduler import Scheduler, observation
from tests.fakes import make_group, make_prompt
from video_opd.config_curriculum import CurriculumConfig
from video_opd.config_file import dump_config, load_config
from video_opd.schemas import write_parquet
from video_opd.types import FailedPrompt


@pytest.fixture
def run(config, tmp_path) -> Path:
    """A run in its second round: p0 dropped, p1 broken, p2 and p3 selected, p4 left out."""
    curriculum = CurriculumConfig(kind="tvdf", num_selected=2)
    config = config.model_copy(update={"curriculum": curriculum, "groups_per_step": 2, "max_policy_lag": 0})
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(5)], config)
    scheduler.validate(np.array([0.25, 0.9, 0.95, 0.85, 0.8]))
    scheduler.start_round(np.array([np.nan, 0.1, 0.2, 0.5, 0.0]), 0)
    scheduler.retire([FailedPrompt(prompt_id="p1", reason="video p1.mp4 [cut] cannot be decoded")])
    folder = tmp_path / "run"
    write_parquet(scheduler.records(), folder / "curriculum" / "round-1.parquet")
    scheduler.start_round(np.array([np.nan, np.nan, 0.35, 0.3, 0.75]), 1)
    scheduler.next_prompts(2)
    scheduler.observe(
        [observation(make_group("p2", [3])), observation(make_group("p3", [], suspended=[2]))], 1
    )
    write_parquet(scheduler.records(), folder / "checkpoints" / "step-2" / "curriculum.parquet")
    (folder / "config.yaml").write_text(dump_config(config, {}))
    return folder


@pytest.mark.parametrize("kind", ["tvdf", "scc"])
def test_show_says_who_was_not_asked(config, tmp_path, capsys, kind):
    options = {"kind": kind, "pool_sample": 3, "scc": {"anchor_frac": 0.5, "schedule": False}}
    config = config.model_copy(update={"curriculum": CurriculumConfig(**options), "groups_per_step": 2})
    scheduler = Scheduler(
        [make_prompt(f"p{i}") for i in range(5)], config.model_copy(update={"max_policy_lag": 0})
    )
    first, second, third = scheduler.to_ask(0)
    scheduler.validate(np.full(5, 0.9), np.array([first, second, third]))
    sigma = np.full(5, np.nan)
    sigma[[first, second, third]] = [0.1, 0.9, 0.2]
    scheduler.start_round(sigma, 0, np.array([first, second, third]))
    write_parquet(scheduler.records(), tmp_path / "run" / "curriculum" / "round-1.parquet")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config, {}))
    (other, _) = set(range(5)) - {first, second, third}
    assert main(["show", str(tmp_path / "run"), "--prompt", f"p{other}"]) == 0
    assert "not asked in round 1: pool_sample=3" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "run"), "--prompt", f"p{first}"]) == 0
    assert ("rank 1 of 3" if kind == "tvdf" else "Frontier") in capsys.readouterr().out


def test_show_lists_prompts_by_state_from_the_newest_records(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:]]
        for line in out.splitlines()
        if (cells := line.strip("│").split("│"))[1:]
    }
    assert rows["dropped: teacher IoU is below 0.7"][:3] == ["1", "0", "0"]
    assert rows["dropped: video p1.mp4 [cut] cannot be decoded"][0] == "1"
    assert rows["selected"] == ["1", "1", "1", "0.950", "0.600"]
    assert rows["suspended"][:3] == ["1", "1", "1"]
    assert rows["left out"][:3] == ["1", "0", "0"]
    assert rows["p2"] == ["selected", "0.600", "0.950", "0.200 0.350", "1", "1"]
    assert "p0" not in rows and "p1" not in rows
    assert "step-2" in out


@pytest.mark.parametrize(
    ("prompt_id", "expected"),
    [
        (
            "p0",
            [
                "p0: dropped",
                "teacher: mean IoU over 4 answers, 0.250, threshold 0.7",
                "dropped: teacher IoU is below 0.7",
                "sampled: never",
            ],
        ),
        ("p1", ["p1: dropped", "dropped: video p1.mp4 [cut] cannot be decoded"]),
        (
            "p2",
            [
                "p2: selected",
                "student: mean IoU over 4 answers, by round 0.200 0.350",
                "disagreement 0.600, rank 1 of 3; 2 selected (top_k)",
                "1 rollouts, last at step 1",
            ],
        ),
        ("p3", ["p3: suspended", "rank 2 of 3", "suspended that time"]),
        ("p4", ["p4: left out", "rank 3 of 3", "sampled: never"]),
    ],
)
def test_show_explains_one_prompt(run, capsys, prompt_id, expected):
    assert main(["show", str(run), "--prompt", prompt_id]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in expected), out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "tvdf", "dbtp": False, "num_selected": 2}, {"drawn at random: 2 selected"}),
        (
            {"kind": "scc", "scc": {"anchor_frac": 0.5, "schedule": False}, "num_selected": 2},
            {"Anchor:", "Frontier:", "neither kind:"},
        ),
        (
            {"kind": "difficulty", "num_selected": 2, "num_student_predictions": 1},
            {
                "drawn with weight 0.011, which is 1 at a student IoU of 0.3; 2 selected",
                "drawn with weight 0.607",
                "student: IoU of its greedy answer, by round 0.900",
            },
        ),
    ],
    ids=["without dbtp", "scc", "difficulty"],
)
def test_show_explains_prompts_that_disagreement_did_not_decide(config, tmp_path, capsys, options, expected):
    config = config.model_copy(
        update={"curriculum": CurriculumConfig(**options), "groups_per_step": 1, "max_policy_lag": 0}
    )
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(3)], config)
    scheduler.validate(np.array([0.9, 0.9, 0.9]))
    asked = options["kind"] in ("scc", "difficulty")
    write_parquet(scheduler.records(), tmp_path / "curriculum" / "records.parquet")
    (tmp_path / "config.yaml").write_text(dump_config(config, {}))
    main(["show", str(tmp_path), "--prompt", "p0"])
    assert "no round has selected prompts yet" in capsys.readouterr().out
    scheduler.start_round(np.array([0.9, 0.5, 0.1]) if asked else None, 0)
    write_parquet(scheduler.records(), tmp_path / "curriculum" / "records.parquet")
    for i in range(3):
        main(["show", str(tmp_path), "--prompt", f"p{i}"])
    out = capsys.readouterr().out
    assert all(part in out for part in expected), out
    assert "rank" not in out


def test_show_and_the_report_explain_a_reverse_kl(config, tmp_path, capsys):
    from driver.records.report import _curriculum

    curriculum = CurriculumConfig(kind="tvdf", disagreement="reverse_kl", num_selected=1)
    sizes = {"groups_per_step": 1, "max_policy_lag": 0}
    config = config.model_copy(update={"curriculum": curriculum, **sizes})
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(3)], config)
    scheduler.validate(np.array([0.9, 0.8, 0.1]))
    scheduler.start_round(np.array([0.5, 0.25, np.nan]), 0, None, np.array([4.5, 12.25, np.nan]))
    records = tmp_path / "curriculum" / "round-1.parquet"
    write_parquet(scheduler.records(), records)
    (tmp_path / "config.yaml").write_text(dump_config(config, {}))
    assert main(["show", str(tmp_path), "--prompt", "p0"]) == 0
    out = capsys.readouterr().out
    assert "student: IoU of one rollout, by round 0.500" in out
    assert "disagreement 4.500 nats of reverse KL, rank 2 of 2; 1 selected (top_k)" in out
    ((_, _), (_, figure)) = _curriculum(tmp_path, config, [])
    axes: Any = figure.axes[0]
    assert axes.get_xlabel() == "reverse KL, nats" and axes.get_xlim()[1] > 12
    assert sum(bar.get_height() for bar in axes.patches) == 2, "none is out of the picture"


def test_show_lists_the_most_frequent_of_thousands_of_states(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(300)], config)
    scheduler.retire([FailedPrompt(prompt_id=f"p{i}", reason=f"v{i} is broken") for i in range(250)])
    write_parquet(scheduler.records(), tmp_path / "curriculum" / "records.parquet")
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "231 other states" in out and len(out.splitlines()) < 40


def test_show_says_what_is_wrong_in_one_line(run, capsys, tmp_path):
    for arguments, expected in (
        ([str(tmp_path / "nowhere")], "holds no curriculum records"),
        ([str(run), "--prompt", "p22"], "no prompt p22 among 5; did you mean p2?"),
    ):
        assert main(["show", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and expected in lines[0]


def test_the_report_shows_what_was_kept_and_selected(run):
    from driver.records.report import _curriculum

    config = load_config(run / "config.yaml")
    pictures = dict(_curriculum(run, config, []))
    legends = {}
    for what, figure in pictures.items():
        shown: Any = [axes.get_legend() for axes in figure.axes]
        legends[what] = [text.get_text() for legend in shown for text in legend.get_texts()]
    assert legends == {
        "teacher IoU, kept and dropped": ["kept: 3", "dropped: 2"],
        "disagreement by round": ["selected: 2", "left: 1"],
    }


def test_records_without_a_round_are_shown_too(config, tmp_path, capsys):
    scheduler = Scheduler([make_prompt("a"), make_prompt("b")], config)
    write_parquet(scheduler.records(), tmp_path / "plain" / "curriculum" / "records.parquet")
    assert pa.types.is_list(
        pq.read_schema(tmp_path / "plain" / "curriculum" / "records.parquet").field("student_iou").type
    )
    assert main(["show", str(tmp_path / "plain")]) == 0
    assert "2 prompts" in capsys.readouterr().out


def test_show_names_the_kind_that_the_scheduler_took_a_prompt_for(config, tmp_path, capsys):
    """A mean of IoUs misses 0.7 by rounding alone."""
    options = {"kind": "scc", "num_selected": 1, "scc": {"anchor_frac": 1.0, "schedule": False}}
    sizes = {"groups_per_step": 1, "max_policy_lag": 0}
    config = config.model_copy(update={"curriculum": CurriculumConfig(**options), **sizes})
    scheduler = Scheduler([make_prompt("p0")], config)
    scheduler.validate(np.array([0.9]))
    sigma = np.mean([0.7] * 3)
    assert sigma < 0.7
    scheduler.start_round(np.array([sigma]), 0)
    write_parquet(scheduler.records(), tmp_path / "curriculum" / "records.parquet")
    (tmp_path / "config.yaml").write_text(dump_config(config, {}))
    assert main(["show", str(tmp_path), "--prompt", "p0"]) == 0
    assert "Anchor: Anchors start at 0.7" in capsys.readouterr().out
