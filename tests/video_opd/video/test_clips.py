"""Frames: which are chosen, at which size, and that they are the ones another decoder sees."""

from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demo.clips import write_mp4
from tests.videos import write_video
from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, FailureKind
from video_opd.video.clips import (
    choose_frame_indices,
    choose_frame_size,
    num_video_tokens,
    plan_clip,
    read_frames,
)

VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)


@pytest.fixture(scope="session")
def noise():
    """uint8[48, 32, 32, 3]: every frame is another picture, with bytes of its own in the file."""
    return np.random.default_rng(0).integers(0, 256, size=(48, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def noise_video(noise, tmp_path):
    path = tmp_path / "noise.mp4"
    write_mp4(path, noise)
    return path


def decode_all(path) -> np.ndarray:
    """Every frame, by PyAV, in the order of display."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_read_frames_are_the_frames_that_another_decoder_sees(split_folder):
    for path in sorted((split_folder / "videos").iterdir()):
        clip = plan_clip("clip", path, VIDEO, 32)
        frames = read_frames(clip, VIDEO)
        assert (frames.shape, frames.dtype) == ((24, 32, 32, 3), np.uint8)
        np.testing.assert_array_equal(frames, decode_all(path)[clip.frame_indices])


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_right_in_any_order_and_when_repeated(noise_video, seed):
    """B-frames and seeking do not shift indices."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 48, size=20)
    clip = replace(plan_clip("clip", noise_video, VIDEO, 32), frame_indices=indices)
    np.testing.assert_array_equal(read_frames(clip, VIDEO), decode_all(noise_video)[indices])


def test_frames_are_resized_to_the_planned_size(tmp_path):
    """64 x 128, the left half black and the right half white: the halves keep their places and colours."""
    frames = np.zeros((8, 64, 128, 3), dtype=np.uint8)
    frames[:, :, 64:] = 255
    write_mp4(tmp_path / "wide.mp4", frames)
    clip = plan_clip("clip", tmp_path / "wide.mp4", replace_tokens(2), 32)
    pixels = read_frames(clip, VIDEO)
    assert (pixels.shape, pixels.dtype) == ((4, 32, 64, 3), np.uint8)
    assert pixels[:, :, :24].max() < 20 and pixels[:, :, 40:].min() > 235


def replace_tokens(tokens_per_frame_pair: int) -> VideoConfig:
    """Four frames, that is two pairs, with this budget for each."""
    return VideoConfig(fps=2, min_frames=4, max_frames=4, max_video_tokens=2 * tokens_per_frame_pair)


video_configs = st.builds(
    lambda fps, low, more, tokens: VideoConfig(
        fps=fps, min_frames=2 * low, max_frames=2 * (low + more), max_video_tokens=tokens
    ),
    fps=st.floats(0.1, 10),
    low=st.integers(1, 10),
    more=st.integers(0, 50),
    tokens=st.integers(100, 5000),
)
video_rates = st.one_of(st.sampled_from([4.0, 24.0, 25.0, 29.97, 30000 / 1001, 60.0]), st.floats(1, 120))


@given(num_video_frames=st.integers(2, 5000), video_fps=video_rates, video=video_configs)
@example(num_video_frames=10, video_fps=4.0, video=VideoConfig(fps=4.4, min_frames=4, max_frames=24))
def test_chosen_frames_are_evenly_many_ascending_and_within_the_video_and_the_bounds(
    num_video_frames, video_fps, video
):
    indices = choose_frame_indices(num_video_frames, video_fps, video)
    assert indices.dtype == np.int64
    assert len(indices) % 2 == 0
    assert 2 <= len(indices) <= video.max_frames
    assert len(indices) >= min(video.min_frames, num_video_frames - num_video_frames % 2)
    assert indices[0] == 0 and indices[-1] < num_video_frames
    assert (np.diff(indices) > 0).all(), indices


@given(seconds=st.integers(2, 100), video_fps=st.sampled_from([4, 8, 24, 30]), fps=st.sampled_from([1, 2, 4]))
def test_frames_within_the_bounds_are_the_times_asked_for(seconds, video_fps, fps):
    video = VideoConfig(fps=fps, min_frames=2, max_frames=1000)
    indices = choose_frame_indices(seconds * video_fps, video_fps, video)
    wanted = seconds * fps - seconds * fps % 2
    assert indices.tolist() == [i * video_fps // fps for i in range(wanted)]


@given(num_video_frames=st.integers(300, 5000), max_frames=st.sampled_from([4, 10, 24]))
def test_a_long_video_is_covered_to_its_end(num_video_frames, max_frames):
    """If fps would give more than max_frames: even spacing, the last frame within one spacing of the end."""
    video = VideoConfig(fps=2, min_frames=4, max_frames=max_frames)
    indices = choose_frame_indices(num_video_frames, 10.0, video)
    assert len(indices) == max_frames
    spacing = np.diff(indices)
    assert spacing.max() - spacing.min() <= 1
    assert num_video_frames - indices[-1] <= spacing.max() + 1


sides = st.integers(32, 2000)


@given(
    height=sides,
    width=sides,
    pairs=st.integers(1, 40),
    tokens=st.integers(40, 4000),
    multiple=st.sampled_from([28, 32]),
)
def test_chosen_size_is_in_multiples_within_the_budget_and_not_enlarged(
    height, width, pairs, tokens, multiple
):
    video = VideoConfig(max_video_tokens=tokens)
    rows, columns = choose_frame_size(height, width, 2 * pairs, video, multiple)
    assert rows % multiple == 0 and columns % multiple == 0
    assert rows > 0 and columns > 0
    assert rows * columns // multiple**2 * pairs <= tokens
    assert rows <= height and columns <= width


@given(height=st.integers(200, 2000), ratio=st.floats(0.5, 2.0), per_pair=st.integers(16, 400))
def test_chosen_size_keeps_the_aspect_ratio_and_uses_the_budget(height, ratio, per_pair):
    """Each side is that of the scaled picture, rounded down by less than a multiple."""
    width, multiple = round(height * ratio), 32
    rows, columns = choose_frame_size(height, width, 4, replace_tokens(per_pair), multiple)
    scale = min(1.0, (per_pair * multiple**2 / (height * width)) ** 0.5)
    assert height * scale - multiple < rows <= height * scale + 1e-6
    assert width * scale - multiple < columns <= width * scale + 1e-6


def test_chosen_size_by_hand():
    assert choose_frame_size(480, 640, 4, replace_tokens(1000), 32) == (480, 640)
    assert choose_frame_size(485, 645, 4, replace_tokens(1000), 32) == (480, 640)
    assert choose_frame_size(640, 640, 4, replace_tokens(100), 32) == (320, 320)
    assert choose_frame_size(32, 32, 4, replace_tokens(1), 32) == (32, 32)
    paper = VideoConfig(max_frame_tokens=768)  # of 8,192: ten pairs of frames may have 819 each
    assert choose_frame_size(1080, 1920, 20, VideoConfig(), 32) == (21 * 32, 38 * 32)
    assert choose_frame_size(1080, 1920, 20, paper, 32) == (20 * 32, 36 * 32)
    assert choose_frame_size(1080, 1920, 24, paper, 32) == (19 * 32, 34 * 32)  # 682 each anyway


@pytest.mark.parametrize(("height", "width"), [(3200, 32), (32, 3200), (640, 128), (128, 640)])
def test_a_very_long_picture_keeps_both_sides_within_the_budget(height, width):
    rows, columns = choose_frame_size(height, width, 4, replace_tokens(1), 32)
    assert (rows, columns) == (32, 32)
    rows, columns = choose_frame_size(height, width, 4, replace_tokens(4), 32)
    assert rows >= 32 and columns >= 32 and rows * columns <= 4 * 32 * 32


def test_a_budget_below_one_token_a_frame_pair_is_an_error():
    with pytest.raises(ClipError, match=r"max_video_tokens=7 .* 8 frame pairs") as caught:
        choose_frame_size(64, 64, 16, VideoConfig(max_video_tokens=7), 32)
    assert "\n" not in str(caught.value)


def test_a_video_cut_off_after_it_was_planned_is_an_error_on_read(noise_video):
    clip = plan_clip("clip", noise_video, VIDEO, 32)
    noise_video.write_bytes(noise_video.read_bytes()[: noise_video.stat().st_size // 2])
    with pytest.raises(ClipError) as caught:
        read_frames(clip, VIDEO)
    assert str(noise_video) in str(caught.value) and "\n" not in str(caught.value)


def test_a_video_that_opens_but_cannot_be_decoded_is_an_error_on_read(noise_video):
    """The index is whole, so the length is right; the second half of the pictures is zeros."""
    clip = plan_clip("clip", noise_video, VIDEO, 32)
    data = bytearray(noise_video.read_bytes())
    index = data.rfind(b"moov") - 4
    data[index // 2 : index] = bytes(index - index // 2)
    noise_video.write_bytes(data)
    with pytest.raises(ClipError, match="cannot be decoded") as caught:
        read_frames(clip, VIDEO)
    assert str(noise_video) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.kind == FailureKind.BROKEN


def test_a_video_that_was_replaced_or_removed_is_an_error_on_read(noise_video, noise):
    clip = plan_clip("clip", noise_video, VIDEO, 32)
    write_mp4(noise_video, noise[:40])
    with pytest.raises(ClipError, match="had 48 frames, now 40") as caught:
        read_frames(clip, VIDEO)
    assert caught.value.kind == FailureKind.REPLACED
    noise_video.unlink()
    with pytest.raises(ClipError, match="is missing") as caught:
        read_frames(clip, VIDEO)
    assert caught.value.kind == FailureKind.MISSING


@pytest.mark.parametrize("rate", [4, 24, 25, 30])
def test_a_plain_video_has_the_times_of_its_indices(noise, tmp_path, rate):
    """No float32 from a container changes them: prompts and fingerprints of plain videos stay the same."""
    write_video(tmp_path / "a.mp4", noise, rate=rate)
    clip = plan_clip("a", tmp_path / "a.mp4", VIDEO, 32)
    assert clip.is_plain and clip.duration_s == 48 / rate
    np.testing.assert_array_equal(clip.frame_indices, choose_frame_indices(48, float(rate), VIDEO))
    np.testing.assert_array_equal(clip.timestamps_s, clip.frame_indices / rate)


def test_tokens_of_a_clip(noise_video):
    clip = plan_clip("a", noise_video, VIDEO, 32)
    assert num_video_tokens(clip, 32) == len(clip.frame_indices) // 2
    assert num_video_tokens(replace(clip, frame_size=(64, 96)), 32) == len(clip.frame_indices) // 2 * 6
