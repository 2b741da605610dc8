"""Deadlines of decoding by the work that it is, and threads by the CPUs that there are."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preflight.inputs import check_decoding
from tests.fakes import make_prompt
from tests.video_opd.video.test_decoding import DEMO, config, workers
from tests.videos import noise, write_images, write_video
from video_opd.config_file import load_config
from video_opd.errors import BrokenVideo, ConfigError, FailureKind
from video_opd.video import decode_pool
from video_opd.video.clips import describe_video, plan_clip, read_frames
from video_opd.video.decode_pool import DecodePool, deadline_s, threads_of_a_worker
from video_opd.video.decoders import THREADS, DecordDecoder

TIMEOUT_S, BIG = 60.0, 1e4


class Worker:
    """In place of a decode worker: notes the seconds that it is given, by question."""

    usable = True

    def __init__(self, unseen: float = 0.0, slow: str = ""):
        self.unseen, self.slow, self.given_s = unseen, slow, {}

    def ask(self, request):
        question, _, _, num_video_frames, seconds = request
        self.given_s[question] = seconds
        if question == self.slow:
            raise TimeoutError
        if question == "open":
            return self.unseen
        return decode_pool.VideoInfo(num_frames=num_video_frames, fps=1.0, size=(2, 2), times_s=None)

    def end(self) -> None:
        pass


def pool_of(worker: Worker, monkeypatch) -> DecodePool:
    monkeypatch.setattr(decode_pool, "_Worker", lambda *_: worker)
    return DecodePool("pyav", 1, TIMEOUT_S)


def test_more_work_has_more_time_in_proportion():
    assert deadline_s(TIMEOUT_S, 0.0) == deadline_s(TIMEOUT_S, 3000.0) == TIMEOUT_S
    full_hd_for_384_s = 384 * 30 * 1920 * 1080 / 1e6
    assert deadline_s(TIMEOUT_S, full_hd_for_384_s) == pytest.approx(477.8, abs=0.1)
    assert deadline_s(2 * TIMEOUT_S, full_hd_for_384_s) == pytest.approx(2 * 477.8, abs=0.2)
    assert deadline_s(TIMEOUT_S, 0.0, num_bytes=5 * 10**9) == 5 * TIMEOUT_S, "opening reads all of a file"


def test_a_file_that_only_a_whole_pass_describes_has_the_time_of_that_pass(monkeypatch):
    worker = Worker(unseen=BIG)
    pool_of(worker, monkeypatch).describe("a.ts")
    assert worker.given_s == {"open": TIMEOUT_S, "describe": pytest.approx(TIMEOUT_S * BIG / 3000)}
    indexed = Worker()
    pool_of(indexed, monkeypatch).describe("a.mp4")
    assert indexed.given_s == {"open": TIMEOUT_S, "describe": TIMEOUT_S}


def test_a_clip_has_the_time_of_what_is_decoded_for_it_and_no_more(monkeypatch):
    worker = Worker(slow="read")
    pool = pool_of(worker, monkeypatch)
    with pytest.raises(BrokenVideo, match=r"a.mp4 was not decoded within 200 s") as e:
        next(pool.read("a.mp4", np.arange(4), 8, BIG))
    assert e.value.kind == FailureKind.TOO_SLOW
    assert worker.given_s["read"] == pytest.approx(200)


def megapixels(path: Path, cut_s=None, **options) -> float:
    return plan_clip("a", path, config(decoder="pyav", **options), 32, cut_s).decode_megapixels


def test_what_is_decoded_for_a_clip_depends_on_where_its_file_can_be_entered(tmp_path):
    size, num_frames = 64 * 64 / 1e6, 120  # 4 s at 30 frames a second; 8 of them are wanted, 15 apart
    frames = noise(num_frames, 64, 64)
    files = {name: tmp_path / name for name in ("a.mp4", "often.mp4", "a.avi", "a.ts")}
    for name, path in files.items():
        write_video(path, frames, key_gap=5 if name == "often.mp4" else 40)
    gaps = {n: describe_video(path, config(decoder="pyav")).key_gap for n, path in files.items()}
    assert gaps == {"a.mp4": 40, "often.mp4": 5, "a.avi": None, "a.ts": None}
    assert megapixels(files["a.mp4"]) == pytest.approx((40 + 7 * 15) * size)
    assert megapixels(files["often.mp4"]) == pytest.approx((5 + 7 * 5) * size)
    assert megapixels(files["a.mp4"], (2.0, 4.0)) == pytest.approx((40 + 3 * 15) * size)
    for name in ("a.avi", "a.ts"):
        assert megapixels(files[name], (2.0, 4.0)) == pytest.approx(num_frames * size), "from its start on"
    write_images(tmp_path / "images", frames[:12])
    folder = megapixels(tmp_path / "images", frame_folder_fps=4.0)
    assert folder == pytest.approx((1 + 5) * size), "only the wanted images"


@pytest.mark.engine
def test_a_decoder_that_is_slow_at_a_large_clip_is_waited_for(tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(b"x")
    video = config(decoder="tests.bad_decoders:Slow", decode_timeout_s=1.5)
    assert (read_frames(plan_clip("large", path, video, 32), video) == 128).all()


@pytest.mark.parametrize(
    ("omp_num_threads", "num_workers", "expected"), [("1", 4, 1), ("8", 4, 2), ("96", 4, 8), ("6", 4, 1)]
)
def test_a_worker_has_its_share_of_the_cpus_of_the_role(monkeypatch, omp_num_threads, num_workers, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    assert threads_of_a_worker(num_workers) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(int(omp_num_threads)))
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert threads_of_a_worker(num_workers) == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of_a_worker(num_workers) == expected


def test_a_library_decodes_with_the_workers_threads_and_shows_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, noise(60, 64, 64))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    before, pool = workers(), DecodePool("decord", 2, TIMEOUT_S)
    pool.describe(str(path))
    (worker,) = workers() - before
    assert f"{THREADS}=3".encode() in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    pool.close()
    indices, read = np.arange(0, 60, 7), []
    for num_threads in ("1", "4"):
        monkeypatch.setenv(THREADS, num_threads)
        read.append(np.empty((len(indices), 64, 64, 3), np.uint8))
        DecordDecoder(str(path)).read(indices, read[-1])
    assert np.array_equal(*read)


def test_a_clip_whose_deadline_is_beyond_that_of_its_call_is_refused(tmp_path):
    prompt = make_prompt("p7")
    longest = replace(prompt, clip=replace(prompt.clip, decode_megapixels=29_000.0))
    check_decoding(load_config(DEMO, []), [prompt, longest])
    longest = replace(prompt, clip=replace(prompt.clip, decode_megapixels=30_000.0))
    with pytest.raises(ConfigError, match=r"p7: its clip may take 600 s to decode .*request_timeout_s=600"):
        check_decoding(load_config(DEMO, []), [prompt, longest])
    file = tmp_path / "11 GB.mp4"
    with file.open("wb") as sparse:
        sparse.truncate(11 * 10**9)
    large = replace(prompt, clip=replace(prompt.clip, video_path=str(file)))
    with pytest.raises(ConfigError, match=r"p7: its clip may take 660 s to decode"):
        check_decoding(load_config(DEMO, []), [prompt, large])
