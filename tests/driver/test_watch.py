"""Metrics for Prometheus (without Ray), the Grafana board, the alert rules, and the lines of the log."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from driver.clock import PhaseClock
from video_opd import prometheus
from video_opd.config_data import VideoConfig
from video_opd.errors import RunError
from video_opd.logs import driver_log, log, start_role_log, work
from video_opd.prometheus import Gauges, count, metric_name
from video_opd.video.frame_cache import FrameCache

ROOT = Path(__file__).resolve().parents[2]
BOARD = json.loads((ROOT / "deploy/grafana/video_opd.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0]["rules"]
VALID_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"


class FakeMetric:
    """In place of ray.util.metrics: keeps what it is told, and is as strict."""

    def __init__(self, kind: str, name: str, tag_keys: tuple[str, ...]):
        self.kind, self.name, self.tag_keys, self.told = kind, name, tag_keys, []

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert (
            self.kind == "Gauge"
            and set(tags) == set(self.tag_keys)
            and all(isinstance(v, str) for v in tags.values())
        )
        self.told.append((value, tags))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.kind == "Counter" and value > 0 and set(tags) == set(self.tag_keys)
        self.told.append((value, tags))


@pytest.fixture
def exported(monkeypatch) -> dict[tuple, FakeMetric]:
    made: dict[tuple, FakeMetric] = {}

    def metric(*key) -> FakeMetric:
        return made.setdefault(key, FakeMetric(*key))

    monkeypatch.setattr(prometheus, "_metric", metric)
    monkeypatch.setattr(prometheus, "_connected", lambda: True)
    monkeypatch.setattr(work, "run", "a-run")
    monkeypatch.setattr(work, "role", "actor-12")
    return made


def values(made: dict[tuple, FakeMetric]) -> dict[str, float]:
    """The last of each, by name and the tags beside `run`."""
    return {
        f"{m.name}{ {k: v for k, v in tags.items() if k != 'run'} or '' }": value
        for m in made.values()
        for value, tags in m.told
    }


def test_a_steps_names_become_gauges_and_what_is_not_finite_is_left_out(exported):
    gauges = Gauges()
    gauges.set_step(
        {"learner/loss": 0.5, "eval/r1@0.3": 0.1, "actors/miou": float("nan"), "teacher/big.one/queue_s": 2.0}
    )
    gauges.export()
    assert values(exported) == {
        "video_opd_learner_loss": 0.5,
        "video_opd_eval_r1_0_3": 0.1,
        "video_opd_teacher_queue_s{'teacher': 'big.one'}": 2.0,
    }
    assert all(tags["run"] == "a-run" for m in exported.values() for _, tags in m.told)


def test_every_round_keeps_its_last_miou_and_gauges_are_exported_again_and_again(exported):
    gauges = Gauges()
    for number, miou in ((1, 0.2), (1, 0.3), (2, 0.4)):
        gauges.set_step({"curriculum/round": number, "actors/miou": miou})
    for _ in range(2):  # Ray forgets a gauge that is not set again
        for metric in exported.values():
            metric.told.clear()
        gauges.export()
        assert values(exported) == {
            "video_opd_curriculum_round": 2,
            "video_opd_actors_miou": 0.4,
            "video_opd_round_actors_miou{'round': '1'}": 0.3,
            "video_opd_round_actors_miou{'round': '2'}": 0.4,
        }


def test_counters_only_grow_and_name_the_kind_of_role(exported):
    for amount in (2.0, 0.0, float("nan"), -1.0, 3):
        count("published_bytes", amount, phase="x")
    ((_, name, _),) = exported
    assert name == "video_opd_published_bytes"
    assert exported["Counter", name, ("run", "role", "phase")].told == [
        (2.0, {"run": "a-run", "role": "actor", "phase": "x"}),
        (3.0, {"run": "a-run", "role": "actor", "phase": "x"}),
    ]


def test_phases_are_counted_as_they_go_on_each_second_and_token_once(exported):
    clock = PhaseClock()
    with clock("update"):
        clock.count("update", 5)
        clock.count("update", 2)
        assert not exported, "a counter costs more than a call's ends"
        clock.advance()
        seconds = exported["Counter", "video_opd_phase_seconds", ("run", "role", "phase")].told
        assert [tags["phase"] for _, tags in seconds] == ["idle", "update"]
    assert clock.take_times()[0]["update"] == pytest.approx(
        sum(s for s, tags in seconds if tags["phase"] == "update")
    )
    tokens = exported["Counter", "video_opd_tokens", ("run", "role", "phase")].told
    assert [(n, tags["phase"]) for n, tags in tokens] == [(7, "update")]


def test_reads_of_the_frame_cache_are_counted(exported, split_folder, tmp_path):
    from video_opd.video.clips import plan_clip

    video = VideoConfig(cache_dir=str(tmp_path), max_frames=8, max_video_tokens=64)
    clip = plan_clip("a", next((split_folder / "videos").glob("*.mp4")), video, 32)
    cache = FrameCache(video)
    for _ in range(3):
        cache.read(clip)
    reads = exported["Counter", "video_opd_frame_cache_reads", ("run", "role", "result")].told
    assert [tags["result"] for _, tags in reads] == ["miss", "hit", "hit"]
    ((seconds, _),) = exported["Counter", "video_opd_decode_seconds", ("run", "role")].told
    assert seconds > 0 and len(exported["Counter", "video_opd_clips_decoded", ("run", "role")].told) == 1


def test_names_are_prometheus_own():
    from re import fullmatch

    for name in ("learner/reverse_kl", "eval/r1@0.5", "tokens_per_s/rollout", "teacher/queue_s"):
        assert fullmatch(VALID_NAME, metric_name(name)), name


def test_without_ray_nothing_happens_and_ray_is_not_imported():
    code = (
        "import sys; from video_opd.prometheus import Gauges, count; count('x');"
        "g = Gauges(); g.set({'y': 1}); g.export(); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def panels() -> list[dict]:
    return [p for p in BOARD["panels"] if p["type"] != "row"]


def test_the_board_has_three_rows_and_every_panel_says_what_it_is_and_what_to_do():
    rows = [p["title"] for p in BOARD["panels"] if p["type"] == "row"]
    assert rows == ["Is it learning", "What is the bottleneck", "Is anything failing"]
    assert len({p["id"] for p in BOARD["panels"]}) == len(BOARD["panels"])
    assert {v["name"] for v in BOARD["templating"]["list"]} == {"datasource", "run"}
    for panel in panels():
        assert (
            panel["title"] and panel["fieldConfig"]["defaults"]["unit"] and len(panel["description"]) > 60
        ), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])


def test_no_two_panels_overlap():
    taken = {}
    for panel in BOARD["panels"]:
        g = panel["gridPos"]
        assert g["x"] + g["w"] <= 24
        for cell in ((x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


@pytest.mark.usefixtures("prometheus_tools")
def test_the_configuration_is_prometheus_own():
    done = subprocess.run(
        ["promtool", "check", "config", ROOT / "deploy/prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "5 rules found" in done.stdout, done.stdout + done.stderr


FIRES = {  # alert: series that make it fire, one value a minute; the same without trouble
    "NoStep": ('ray_video_opd_seconds_since_step{run="a"}', "0+60x60", "0+1x60"),
    "ActorsLost": ('ray_video_opd_actors_lost{run="a"}', "0x45 1+1x14", "0x45 1x14"),
    "LearnerRestarted": ('ray_video_opd_learner_restarts{run="a"}', "0x45 1x14", "0x60"),
    "ReplicasMissing": ('ray_video_opd_teacher_replicas_wanted{run="a"}', "4x60", "2x60"),
    "PromptsDropped": ('ray_video_opd_dropped_prompts{run="a",reason="broken"}', "0x50 3x9", "3x60"),
}


@pytest.mark.usefixtures("prometheus_tools")
@pytest.mark.parametrize("fires", [True, False])
def test_alerts_fire_when_they_should_and_only_then(fires, tmp_path):
    assert {r["alert"] for r in RULES} == set(FIRES)
    running = {"series": 'ray_video_opd_teacher_replicas{run="a"}', "values": "2x60"}
    series = [{"series": name, "values": bad if fires else good} for name, bad, good in FIRES.values()]
    queries = [
        {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": "59m"}
        | {"exp_samples": [{"labels": "{}", "value": 1}] if fires else []}
        for name in FIRES
    ]
    tests = [{"interval": "1m", "input_series": [*series, running], "promql_expr_test": queries}]
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(ROOT / "deploy/alerts.yml")], "evaluation_interval": "1m", "tests": tests}
        )
    )
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_a_drivers_events_are_json_lines_and_text_and_a_resumed_run_appends(tmp_path, capsys):
    for step in (0, 7):
        with driver_log(tmp_path, step):
            log.warning("actor-3 was lost\nand %s", "is replaced")
            log.debug("for the file alone")
            logging.getLogger("video_opd.video.frame_cache").warning("of a module")
    said = [e for e in lines_of(tmp_path) if "actor-3" in e["message"]]
    assert [(e["level"], e["run"], e["step"], e["role"]) for e in said] == [
        ("WARNING", tmp_path.name, s, "driver") for s in (0, 7)
    ]
    assert all(e["time"].endswith("+00:00") for e in said)
    assert [e["message"] for e in lines_of(tmp_path)].count("for the file alone") == 2
    out, err = capsys.readouterr()
    assert out == "actor-3 was lost\nand is replaced\nof a module\n" * 2 and err == ""


def test_why_a_run_ended_is_the_last_line_of_its_file_and_not_said_twice(tmp_path, capsys):
    with pytest.raises(ExceptionGroup), driver_log(tmp_path, 0):
        raise ExceptionGroup("tasks", [RunError("the disk is full")])
    last = lines_of(tmp_path)[-1]
    assert (last["level"], last["message"]) == ("ERROR", "the run ended: the disk is full")
    with pytest.raises(KeyError), driver_log(tmp_path, 0):
        raise KeyError("a bug")
    assert "Traceback" in lines_of(tmp_path)[-1]["exc_info"]
    assert capsys.readouterr() == ("", "") and not log.handlers


def test_a_roles_events_go_to_its_stderr(capsys):
    try:
        start_role_log("a-run", "learner-1")
        log.info("started")
        event = json.loads(capsys.readouterr().err)
    finally:
        log.handlers, log.propagate = [], True
    assert (event["run"], event["role"], event["message"]) == ("a-run", "learner-1", "started")
