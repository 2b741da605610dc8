"""benchmarks.feed: what is counted, and clips that are different files of different pictures."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import clips, events
from benchmarks.emulated_engines import has_pixels
from benchmarks.events import FOLDER, ROLE, Event, read_events, record_calls
from benchmarks.feed import GROUPS, slowest_s, summary
from video_opd.config_data import VideoConfig
from video_opd.video.clips import plan_clip, read_frames


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(ROLE, "actor")
    return tmp_path


def test_calls_are_recorded_without_those_inside_them(folder, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])  # of the thread: outer begins, inner begins and ends, outer ends
    monkeypatch.setattr(events.time, "thread_time", lambda: next(clock))
    module = SimpleNamespace(inner=lambda: 2, outer=lambda: module.inner() + 1)
    for name in ("inner", "outer"):
        record_calls(module, name, name.upper())
        record_calls(module, name, "twice")
    assert module.outer() == 3
    found = read_events(folder)
    assert [(e.kind, e.role, e.cpu_s) for e in found] == [("INNER", "actor", 3.0), ("OUTER", "actor", 7.0)]


def test_calls_that_raise_and_calls_of_other_threads_are_recorded(folder):
    def fail() -> None:
        raise ValueError("broken")

    module = SimpleNamespace(fail=fail, work=lambda: 1)
    record_calls(module, "fail", "fail")
    record_calls(module, "work", "work")
    with pytest.raises(ValueError, match="broken"):
        module.fail()
    threads = [threading.Thread(target=module.work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.kind for e in read_events(folder)] == ["fail", "work", "work", "work"]


def test_calls_whose_arguments_do_not_count_are_not_recorded(folder):
    module = SimpleNamespace(double=lambda number: 2 * number)
    record_calls(module, "double", "double", lambda number: number > 1)
    assert [module.double(n) for n in (1, 2, 3)] == [2, 4, 6]
    assert len(read_events(folder)) == 2


def test_a_processor_that_only_asks_for_sizes_makes_no_pass_over_pixels():
    assert has_pixels(None, [np.zeros((2, 4, 4, 3), np.uint8)])
    assert not has_pixels(None, [SimpleNamespace(device="meta")])


def event(kind: str, role: str, began: float, cpu_s: float) -> Event:
    return Event(kind, role, began, 0.0, cpu_s)


def test_preprocessing_is_what_happens_after_the_first_clip_is_opened_without_decoding():
    tried = [event("vllm", "actor", 1.0, 8.0), event("pixels", "actor", 1.0, 8.0)]
    decodes = [event("decode", "actor", 2.0, 4.0), event("decode", "teacher", 5.0, 4.0)]
    actor = [event("encode", "actor", 3.0, 2.0), event("pixels", "actor", 3.0, 1.0)]
    others = [event("encode", "teacher", 6.0, 4.0), event("encode", "learner", 7.0, 6.0)]
    assert summary([*tried, *decodes, *actor, *others], 2) == {
        "decodes": 1.0,
        "pixel_passes": 0.5,
        "actor_cpu_s": 1.5,
        "teacher_cpu_s": 2.0,
        "learner_cpu_s": 3.0,
        "cpu_s": 6.5,
    }


def test_the_slowest_phase_of_the_papers_run_is_the_update():
    assert slowest_s(1.0) == 1.75 * GROUPS / 4
    assert slowest_s(8.0) == 8 * slowest_s(1.0)


def test_long_clips_show_the_same_scenes_in_other_orders(tmp_path, monkeypatch):
    sizes = {"HEIGHT": 40, "WIDTH": 64, "RATE": 6, "SECONDS": 3, "SCENES": 4, "NOISE": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(clips, name, value)
    overrides = clips.write_long_clips(tmp_path / "long", 3)
    assert f"data.train.annotations={tmp_path / 'long' / 'annotations.txt'}" in overrides
    video = VideoConfig(fps=6, max_frames=18)
    planned = [plan_clip(p.stem, p, video, 8) for p in sorted((tmp_path / "long" / "videos").iterdir())]
    assert [(c.num_video_frames, c.video_fps, c.duration_s, c.is_plain) for c in planned] == [
        (18, 6, 3, True)
    ] * 3
    scenes = [read_frames(clip, video).reshape(3, 6, -1) for clip in planned]
    assert len({frames.tobytes() for frames in scenes}) == 3
    pictures = [scene.tobytes() for frames in scenes for scene in frames]
    assert len(set(pictures)) <= 4, "a scene looks the same wherever it is"


@pytest.mark.engine  # imports torch
def test_a_batch_of_the_sleeping_student_has_what_the_loss_asks_for():
    from benchmarks.emulated_learner import _collate

    batch = _collate([], [np.array([5, 6]), np.array([7])])
    assert batch.targets.tolist() == [5, 6, 7] and batch.lengths == (2, 1)
    assert sum(tree.num_tokens for tree in batch.trees) == 0
