"""Synthetic grounding clips: shapes that appear and disappear, as h264 mp4 files in Charades-STA layout."""

import csv
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from video_opd.grounding import temporal_iou

DURATION_S = 12
VIDEO_FPS = 4  # twice the rate at which models sample, so that frame selection is real
SIZE = 32  # pixels; one video token of the tiny models covers 32 x 32 pixels of two frames
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 60, 230),
    "yellow": (230, 220, 30),
    "white": (240, 240, 240),
    "magenta": (220, 40, 220),
}
SHAPES = ("square", "bar", "pole")


@dataclass(frozen=True)
class Level:
    """How hard a clip is. Events last min_s to max_s seconds and start and end on a grid of grid_s seconds."""

    num_objects: tuple[int, int]  # at least, at most
    shapes: tuple[str, ...]  # more than one: distractors share the colour or the shape of the asked object
    grid_s: float
    min_s: float = 2.0
    max_s: float = 4.0  # short events keep the best constant interval low
    opacity: float = 1.0  # of the objects over the background


LEVELS = {
    "colour": Level(num_objects=(1, 2), shapes=("square",), grid_s=1.0),
    "shape": Level(num_objects=(2, 2), shapes=SHAPES, grid_s=1.0),
    "half_second": Level(num_objects=(1, 2), shapes=("square",), grid_s=0.5),
    "faint": Level(
        num_objects=(2, 2), shapes=SHAPES, grid_s=1.0, opacity=0.15
    ),  # the demo's teacher answers badly
}
MAX_SPOILED_IOU = 0.3  # of a wrong label with the truth
SPLIT_SEEDS = {"pretrain": 1, "train": 2, "eval": 3}  # disjoint random streams


@dataclass(frozen=True)
class Event:
    """One object and the interval in which it is visible, in seconds."""

    colour: str
    shape: str
    start_s: float
    end_s: float
    x: int
    y: int
    radius: int
    opacity: float

    @property
    def query(self) -> str:
        return f"the {self.colour} {self.shape} is visible"


def draw_events(level: Level, rng: np.random.Generator) -> list[Event]:
    """Distinct (colour, shape) pairs; with several shapes, the second object is a near miss of the first."""
    pairs = [(c, s) for c in COLOURS for s in level.shapes]
    chosen = [pairs[rng.integers(len(pairs))]]
    if len(level.shapes) > 1:
        near = [p for p in pairs if (p[0] == chosen[0][0]) != (p[1] == chosen[0][1])]
        chosen.append(near[rng.integers(len(near))])
    fewest, most = level.num_objects
    num_objects = rng.integers(fewest, most + 1)
    while len(chosen) < num_objects:
        pair = pairs[rng.integers(len(pairs))]
        if pair not in chosen:
            chosen.append(pair)
    events = []
    for colour, shape in chosen:
        steps = rng.integers(round(level.min_s / level.grid_s), round(level.max_s / level.grid_s) + 1)
        first = rng.integers(0, round(DURATION_S / level.grid_s) - steps + 1)
        x, y = rng.integers(8, SIZE - 8, size=2)
        radius = rng.integers(5, 8)
        start, end = first * level.grid_s, (first + steps) * level.grid_s
        events.append(
            Event(colour, shape, float(start), float(end), int(x), int(y), int(radius), level.opacity)
        )
    return events


def _mask(event: Event) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy, r = np.abs(x - event.x), np.abs(y - event.y), event.radius
    if event.shape == "square":
        return (dx < r) & (dy < r)
    return (dy if event.shape == "bar" else dx) < r // 2


def render(events: list[Event], rng: np.random.Generator) -> np.ndarray:
    """uint8[frames, SIZE, SIZE, 3]: the events over a dim, noisy background; later events lie on top."""
    num_frames = DURATION_S * VIDEO_FPS
    background = rng.uniform(0, 80, size=3)
    frames = background + rng.normal(0, 8, size=(num_frames, SIZE, SIZE, 3))
    for event in events:
        shown = slice(round(event.start_s * VIDEO_FPS), round(event.end_s * VIDEO_FPS))
        under = frames[shown, _mask(event)]
        frames[shown, _mask(event)] = (
            event.opacity * np.array(COLOURS[event.colour]) + (1.0 - event.opacity) * under
        )
    return np.clip(frames, 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """h264, yuv420p, with B-frames, as videos in the wild are; without x264's assembly, which on frames this small is not
    the same from one call to the next."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=VIDEO_FPS, options={"crf": "18", "preset": "veryfast", "x264-params": "asm=0"}
        )
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_split(
    folder: Path, split: str, num_clips: int, levels: tuple[str, ...], spoil_frac: float = 0.0
) -> None:
    """Writes annotations.txt, lengths.csv and videos/ of one split; every object of a clip is asked for once.

    A share of spoil_frac of the labels, drawn at random, names a wrong interval; spoiled.csv lists their lines and the
    truth. The folder appears whole or not at all. Same arguments, same clips; the clips do not depend on spoil_frac.
    """
    rng = np.random.default_rng([SPLIT_SEEDS[split], 2602_02994])
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "videos").mkdir(parents=True)
    asked: list[tuple[str, Event]] = []
    lengths = []
    for number in range(num_clips):
        video_id = f"{split}{number:05d}"
        events = draw_events(LEVELS[levels[number % len(levels)]], rng)
        write_mp4(temporary / "videos" / f"{video_id}.mp4", render(events, rng))
        lengths.append((video_id, float(DURATION_S)))
        hidden = [_visible_share(events, i) < 0.35 for i in range(len(events))]
        asked += [(video_id, event) for event, h in zip(events, hidden, strict=True) if not h]
    labels, spoiled = _labels(
        [event for _, event in asked], spoil_frac, np.random.default_rng([SPLIT_SEEDS[split], 1])
    )
    lines = [
        f"{video} {start} {end}##{event.query}"
        for (video, event), (start, end) in zip(asked, labels, strict=True)
    ]
    (temporary / "annotations.txt").write_text("\n".join(lines) + "\n")
    _write_csv(temporary / "lengths.csv", ("id", "length"), lengths)
    truth = [(i + 1, asked[i][1].start_s, asked[i][1].end_s) for i in spoiled]
    _write_csv(temporary / "spoiled.csv", ("line", "true_start_s", "true_end_s"), truth)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _labels(
    events: list[Event], spoil_frac: float, rng: np.random.Generator
) -> tuple[list[tuple[float, float]], list[int]]:
    """Every event's interval, and which of them are wrong: moved to where less than MAX_SPOILED_IOU of it is right."""
    labels = [(e.start_s, e.end_s) for e in events]
    spoiled = sorted(rng.permutation(len(events))[: round(spoil_frac * len(events))].tolist())
    for i in spoiled:
        true, length = labels[i], labels[i][1] - labels[i][0]
        while temporal_iou(labels[i], true) >= MAX_SPOILED_IOU:
            start = float(rng.integers(0, DURATION_S - round(length) + 1))
            labels[i] = (start, min(start + length, float(DURATION_S)))
    return labels, spoiled


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _visible_share(events: list[Event], index: int) -> float:
    """Share of the object's pixels that no later object covers at any time they share."""
    mask = _mask(events[index])
    covered = np.zeros_like(mask)
    for other in events[index + 1 :]:
        if other.start_s < events[index].end_s and events[index].start_s < other.end_s:
            covered |= _mask(other)
    return float((mask & ~covered).sum() / mask.sum())


SPLIT_CLIPS = {"train": 2000, "eval": 120}
DEFAULT_LEVELS = ("colour", "shape")


def ensure_clips(
    folder: Path,
    levels: tuple[str, ...] = DEFAULT_LEVELS,
    spoil_frac: float = 0.0,
    num_train: int = SPLIT_CLIPS["train"],
) -> list[str]:
    """Writes the splits that `folder` lacks, or has from other arguments or another version of this file; returns their names.

    The arguments are those of the training split; the evaluation split is always clean and of the default levels.
    """
    code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()
    arguments: dict[str, Any] = {
        "train": {"num_clips": num_train, "levels": levels, "spoil_frac": spoil_frac},
        "eval": {"num_clips": SPLIT_CLIPS["eval"], "levels": DEFAULT_LEVELS},
    }
    written = []
    for split, of_split in arguments.items():
        version, stamp = f"{code} {of_split}", folder / split / "VERSION"
        if not stamp.is_file() or stamp.read_text() != version:
            write_split(folder / split, split, **of_split)
            stamp.write_text(version)
            written.append(split)
    return written
