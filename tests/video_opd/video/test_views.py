"""What a teacher sees of a clip, against a brute-force reading of the video's frame times."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_prompt
from video_opd.config_data import VideoConfig
from video_opd.config_teachers import TeacherModel
from video_opd.errors import ClipError
from video_opd.types import Prompt
from video_opd.video.clips import plan_clip
from video_opd.video.video_file import VideoInfo
from video_opd.video.views import crop_of, viewed

RUN = VideoConfig(fps=1.0, min_frames=4, max_frames=16, max_video_tokens=64)
OWN = RUN.model_copy(update={"fps": 4.0, "max_frames": 64, "max_video_tokens": 256})


def video(num_frames: int, fps: float, uneven: bool) -> tuple[VideoInfo, np.ndarray]:
    """A video and the times of its frames."""
    times = np.arange(num_frames) / fps
    if uneven:
        times = times + np.where(np.arange(num_frames) % 3 == 1, 0.4 / fps, 0.0)
    shown = times if uneven else None
    info = VideoInfo(num_frames=num_frames, fps=fps, size=(64, 96), key_gap=None, times_s=shown)
    return info, times


def teacher(margin_frac: float | None) -> TeacherModel:
    return TeacherModel(name="t", model="m", crop_margin_frac=margin_frac)


def prompt_of(info: VideoInfo, cut_s: tuple[float, float] | None, spans: tuple) -> Prompt:
    clip = plan_clip("c", "/v.mp4", RUN, 32, cut_s, info)
    prompt = make_prompt("p", spans)
    return Prompt(prompt_id="p", clip=clip, query=prompt.query, answer_spans_s=spans)


@given(
    st.integers(200, 400),
    st.sampled_from([5.0, 10.0, 12.5]),
    st.booleans(),
    st.sampled_from([None, (2.0, 14.0)]),
    st.tuples(st.floats(0, 6), st.floats(0.1, 4)),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_a_crop_shows_frames_within_it_alone_at_their_true_times(
    num_frames, fps, uneven, cut_s, span, margin
):
    info, times = video(num_frames, fps, uneven)
    spans = ((span[0], span[0] + span[1]),)
    prompt = prompt_of(info, cut_s, spans)
    clip, start_s = prompt.clip, cut_s[0] if cut_s else 0.0
    seen = viewed(prompt, teacher(margin), OWN, 32, info).clip
    assert (seen.start_s, seen.duration_s, seen.clip_id) == (clip.start_s, clip.duration_s, clip.clip_id)
    np.testing.assert_allclose(seen.timestamps_s, times[seen.frame_indices] - start_s, atol=1e-9)
    wide = max(margin * span[1], (OWN.min_frames / OWN.fps - span[1]) / 2)
    first, last = max(0.0, span[0] - wide), min(clip.duration_s, span[0] + span[1] + wide)
    assert seen.timestamps_s.min() >= first - 2e-3 and seen.timestamps_s.max() < last
    within = np.flatnonzero((times - start_s >= first) & (times - start_s < last - 2e-3))
    assert np.isin(seen.frame_indices, np.arange(within[0] - 1, within[-1] + 1)).all()
    assert seen.frame_indices[0] - within[0] <= 1, "from its first frame on"
    assert len(seen.frame_indices) >= min(OWN.min_frames, len(within) // 2 * 2)
    plain = viewed(prompt, teacher(None), RUN, 32, info).clip
    assert (plain.frame_indices == clip.frame_indices).all() and plain.frame_size == clip.frame_size
    more = viewed(prompt, teacher(None), OWN, 32, info).clip
    assert len(more.frame_indices) > len(clip.frame_indices)
    assert more.timestamps_s.max() <= clip.duration_s


def test_several_spans_are_in_one_crop_and_a_short_one_gets_room():
    assert crop_of(((4.0, 5.0), (8.0, 12.0)), 30.0, 0.25, 2.0) == (2.0, 14.0)
    assert crop_of(((4.0, 5.0),), 30.0, 0.25, 4.0) == (2.5, 6.5)
    assert crop_of(((0.5, 1.0), (29.0, 30.0)), 30.0, 1.0, 2.0) == (0.0, 30.0)


def test_a_crop_of_less_than_two_frames_is_an_error():
    info, _ = video(30, 0.5, uneven=False)
    with pytest.raises(ClipError, match="at least 2 are needed"):
        viewed(prompt_of(info, None, ((10.0, 10.5),)), teacher(0.0), OWN, 32, info)
