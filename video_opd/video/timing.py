"""The times of pictures, from timestamps that may be missing, equal, out of order, or begin again."""

from bisect import bisect_left

import numpy as np

_WINDOW = 5  # pictures on each side that tell a clock that began again from one wrong timestamp


def shown_times(pts_s: np.ndarray, dts_s: np.ndarray) -> np.ndarray | None:
    """float64[N] in seconds, ascending from 0; None: the file has no times.

    pts_s, dts_s: float64[N] of the pictures as they leave the decoder, NaN where missing. As in ffmpeg, a
    picture without a presentation time has that of the packet that completed it. A doubtful timestamp is
    replaced by one between those of its neighbours; if more than half are doubtful, the file has no times.
    """
    own = np.where(np.isnan(pts_s), dts_s, pts_s)
    if len(own) > 1 and (np.diff(own) > 0).all():
        return own - own[0]
    times = _join_clocks(min(own, dts_s, key=lambda t: np.isnan(t).sum() + (np.diff(t) <= 0).sum()))
    sound = _longest_ascent(times)
    if not len(times) or len(sound) < max(2, len(times) / 2):
        return None
    gap = np.median(np.diff(times[sound]) / np.diff(sound))
    first, last = sound[0], sound[-1]
    places = np.concatenate([[0], sound, [len(times) - 1]])
    ends = times[first] - first * gap, times[last] + (len(times) - 1 - last) * gap
    times = np.interp(np.arange(len(times)), places, np.concatenate([ends[:1], times[sound], ends[1:]]))
    return times - times[0]


def rate_and_times(
    num_frames: int, average_rate: float, times_s: np.ndarray | None
) -> tuple[float, np.ndarray | None]:
    """Frames a second, and their times if the rate varies.

    A rate is constant if no frame is further than half a frame from its place.
    """
    if times_s is None or num_frames < 2:
        return average_rate, None
    mean_rate = (num_frames - 1) / float(times_s[-1])
    for rate in (average_rate, mean_rate):
        if rate > 0 and np.abs(times_s - np.arange(num_frames) / rate).max() <= 0.5 / rate:
            return rate, None
    return mean_rate, times_s


def _join_clocks(times: np.ndarray) -> np.ndarray:
    """Where recordings were joined, the second goes on where the first ended."""
    known = np.flatnonzero(~np.isnan(times))
    times, t = times.copy(), times[known]
    gaps = np.diff(t)
    gap = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 0.0
    for i in np.flatnonzero(gaps < 0) + 1:
        if np.median(t[i : i + _WINDOW]) < np.median(t[max(0, i - _WINDOW) : i]):
            t[i:] += t[i - 1] + gap - t[i]
    times[known] = t
    return times


def _longest_ascent(times: np.ndarray) -> np.ndarray:
    """int64: where the most times that strictly ascend are; the first of equals. NaN is left out."""
    lowest_ends: list[float] = []  # of ascents by length
    at: list[int] = []
    before = np.full(len(times), -1)
    for i in np.flatnonzero(~np.isnan(times)).tolist():
        length = bisect_left(lowest_ends, times[i])
        if lowest_ends[length : length + 1] == [times[i]]:
            continue
        before[i] = at[length - 1] if length else -1
        lowest_ends[length : length + 1], at[length : length + 1] = [float(times[i])], [i]
    ascent = at[-1:]
    while ascent and before[ascent[-1]] >= 0:
        ascent.append(int(before[ascent[-1]]))
    return np.array(ascent[::-1], np.int64)
