"""What a prompt says of its clip: true times of plain videos, cuts and variable rates; the fingerprint."""

from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import make_clip
from video_opd.models.prompting import fingerprint, video_metadata
from video_opd.video.frame_cache import digest_of

IDS, GRID, INDICES = np.arange(5), (2, 2, 2), np.array([0, 2, 4, 6])
DIGEST = digest_of(np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3))


def test_metadata_of_a_plain_video_is_of_its_frames():
    clip = make_clip()
    assert video_metadata(clip) == {
        "total_num_frames": 48,
        "fps": 4.0,
        "frames_indices": list(range(0, 48, 2)),
        "duration": 12.0,
        "video_backend": "decord",
        "height": 32,
        "width": 32,
    }
    assert all(type(i) is int for i in video_metadata(clip)["frames_indices"])


def shown(metadata: dict) -> list[float]:
    """The times that Qwen3-VL's processors write: the mean of each pair."""
    times = np.array(metadata["frames_indices"]) / metadata["fps"]
    return [round(float(t), 1) for t in times.reshape(-1, 2).mean(1)]


def spacing_s(metadata: dict) -> float:
    """Between pairs, as Qwen2.5-VL's processor has it: its frames a second are F / total_num_frames * fps."""
    return 2 * metadata["total_num_frames"] / (len(metadata["frames_indices"]) * metadata["fps"])


def test_metadata_of_a_cut_counts_from_its_start():
    clip = replace(make_clip(), start_s=3.0, duration_s=4.0, frame_indices=np.arange(12, 28, 2))
    metadata = video_metadata(clip)
    assert shown(metadata) == pytest.approx([0.2, 1.2, 2.2, 3.2], abs=0.051)
    assert (metadata["duration"], metadata["total_num_frames"], spacing_s(metadata)) == (4.0, 16, 1.0)


def test_metadata_of_a_variable_rate_has_the_frames_own_times():
    times = np.array([0.0, 0.5, 4.0, 4.5, 9.0, 11.0])
    clip = replace(make_clip(), frame_indices=np.array([0, 3, 9, 10, 30, 40]), frame_times_s=times)
    metadata = video_metadata(clip)
    np.testing.assert_allclose(np.array(metadata["frames_indices"]) / metadata["fps"], times)
    assert shown(metadata) == [0.2, 4.2, 10.0]
    assert spacing_s(metadata) == pytest.approx(4.0), "12 s in three pairs: the mean"


def test_the_fingerprint_of_a_plain_clip_stays_what_it_is():
    assert fingerprint(IDS, GRID, INDICES, DIGEST) == "e2618f245b0525f099c4b62d8b354a89"


def test_the_fingerprint_tells_apart_all_that_a_model_sees():
    clip = make_clip()
    prints = [
        fingerprint(IDS, GRID, INDICES, DIGEST),
        fingerprint(IDS + 1, GRID, INDICES, DIGEST),
        fingerprint(IDS, (2, 4, 1), INDICES, DIGEST),
        fingerprint(IDS, GRID, INDICES + 1, DIGEST),
        fingerprint(IDS, GRID, INDICES, DIGEST[::-1]),
        fingerprint(IDS, GRID, INDICES, DIGEST, clip.timestamps_s.tolist()),
        fingerprint(IDS, GRID, INDICES, DIGEST, (clip.timestamps_s + 1e-6).tolist()),
    ]
    assert len(set(prints)) == len(prints)
