"""Synthetic grounding clips: shapes that appear and disappear, as h264 mp4 files in Charades-STA layout."""

import csv
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np

from video_opd.grounding import temporal_iou
from video_opd.types import Span

DURATION_S = 12
VIDEO_FPS = 4  # twice the rate at which models sample, so that frame selection has work to do
SIZE = 32  # pixels; one video token of the tiny models covers 32 x 32 pixels of two frames
SPLIT_FILES = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}  # config keys
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 60, 230),
    "yellow": (230, 220, 30),
    "white": (240, 240, 240),
    "magenta": (220, 40, 220),
}
SHAPES = ("square", "bar", "pole")


MIN_S, MAX_S = 2.0, 4.0  # of an event: short ones keep the best constant interval low
T = TypeVar("T")


@dataclass(frozen=True)
class Level:
    """How hard a clip is."""

    num_objects: tuple[int, int]  # at least, at most
    shapes: tuple[str, ...]  # if several: distractors share the colour or the shape of the first object
    grid_s: float = 1.0  # events start and end on this grid
    opacity: float = 1.0  # of the objects over the background


LEVELS = {
    "colour": Level((1, 2), ("square",)),
    "shape": Level((2, 2), SHAPES),
    "half_second": Level((1, 2), ("square",), grid_s=0.5),
    "faint": Level((2, 2), SHAPES, opacity=0.15),  # the demo's teacher answers badly here
}
DEFAULT_LEVELS = ("colour", "shape")
MAX_SPOILED_IOU = 0.3  # of a wrong label with the truth
MIN_VISIBLE_SHARE = 0.35  # of an object that is asked for
SPLIT_SEEDS = {"pretrain": 1, "train": 2, "eval": 3}  # disjoint random streams
SPLIT_CLIPS = {"train": 2000, "eval": 120}


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

    @property
    def mask(self) -> np.ndarray:
        """bool[SIZE, SIZE]: the object's pixels."""
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        dx, dy, r = np.abs(x - self.x), np.abs(y - self.y), self.radius
        if self.shape == "square":
            return (dx < r) & (dy < r)
        return (dy if self.shape == "bar" else dx) < r // 2


def draw_events(level: Level, rng: np.random.Generator) -> list[Event]:
    """Distinct (colour, shape) pairs; with several shapes, the second object is a near miss of the first."""
    pairs = [(c, s) for c in COLOURS for s in level.shapes]
    chosen = [pairs[rng.integers(len(pairs))]]
    if len(level.shapes) > 1:
        near = [p for p in pairs if (p[0] == chosen[0][0]) != (p[1] == chosen[0][1])]
        chosen.append(near[rng.integers(len(near))])
    num_objects = rng.integers(*level.num_objects, endpoint=True)
    while len(chosen) < num_objects:
        pair = pairs[rng.integers(len(pairs))]
        if pair not in chosen:
            chosen.append(pair)
    events = []
    for colour, shape in chosen:
        shortest, longest, all_steps = (round(s / level.grid_s) for s in (MIN_S, MAX_S, DURATION_S))
        steps = rng.integers(shortest, longest, endpoint=True)
        first = rng.integers(0, all_steps - steps, endpoint=True)
        x, y = rng.integers(8, SIZE - 8, size=2)
        start, end = float(first * level.grid_s), float((first + steps) * level.grid_s)
        place = int(x), int(y), int(rng.integers(5, 8))
        events.append(Event(colour, shape, start, end, *place, level.opacity))
    return events


def render(events: list[Event], rng: np.random.Generator) -> np.ndarray:
    """uint8[frames, SIZE, SIZE, 3]: the events over a dim, noisy background; later events lie on top."""
    background = rng.uniform(0, 80, size=3)
    frames = background + rng.normal(0, 8, size=(DURATION_S * VIDEO_FPS, SIZE, SIZE, 3))
    for event in events:
        pixels = slice(round(event.start_s * VIDEO_FPS), round(event.end_s * VIDEO_FPS)), event.mask
        over, under = event.opacity * np.array(COLOURS[event.colour]), (1.0 - event.opacity) * frames[pixels]
        frames[pixels] = over + under
    return np.clip(frames, 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """h264, yuv420p, with B-frames, as in real videos.

    x264's assembly is off: on frames this small its output differs from one call to the next.
    """
    options = {"crf": "18", "preset": "veryfast", "x264-params": "asm=0"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class Drawn(NamedTuple):
    """A clip, before it is rendered."""

    clip_id: str
    events: list[Event]
    asked: list[Event]  # those of the events that prompts ask for


def write_split(
    folder: Path, split: str, num_clips: int, levels: Sequence[str], spoil_frac: float = 0
) -> None:
    """Writes annotations.txt, lengths.csv and videos/ of one split, with one query for each object of a clip.

    A random share of spoil_frac of the labels is wrong; spoiled.csv lists their lines and the truth. The
    folder appears whole or not at all. The same arguments give the same clips, whatever spoil_frac is.
    """
    rng = np.random.default_rng([SPLIT_SEEDS[split], 2602_02994])

    def draw(number: int, level: str) -> Drawn:
        events = draw_events(LEVELS[level], rng)
        return Drawn(f"{split}{number:05d}", events, in_sight(events))

    with whole_folder(folder) as temporary:
        clips = write_videos(temporary, itertools.starmap(draw, enumerate(in_turn(levels, num_clips))), rng)
        labels = spoil(truth_of(clips), spoil_frac, np.random.default_rng([SPLIT_SEEDS[split], 1]))
        write_labels(temporary, clips, labels)


def in_turn(kinds: Sequence[T], num_clips: int) -> Iterator[T]:
    return itertools.islice(itertools.cycle(kinds), num_clips)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` in the end."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "videos").mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_videos(folder: Path, drawn: Iterable[Drawn], rng: np.random.Generator) -> list[Drawn]:
    """Draws clips and writes videos/ and lengths.csv."""
    clips = []
    for clip in drawn:
        write_mp4(folder / "videos" / f"{clip.clip_id}.mp4", render(clip.events, rng))
        clips.append(clip)
    write_csv(folder / "lengths.csv", ("id", "length"), ((c.clip_id, float(DURATION_S)) for c in clips))
    return clips


def truth_of(clips: Sequence[Drawn]) -> list[Span]:
    """The true interval of each query, in the order of the annotations."""
    return [(event.start_s, event.end_s) for clip in clips for event in clip.asked]


def write_labels(
    folder: Path, clips: Sequence[Drawn], labels: Sequence[Span], name: str = "annotations.txt"
) -> None:
    """Writes a label for each query, and spoiled.csv: the lines whose label is wrong, and the truth."""
    asked = [(clip.clip_id, event.query) for clip in clips for event in clip.asked]
    pairs = zip(asked, labels, strict=True)
    lines = [f"{clip_id} {start} {end}##{query}\n" for (clip_id, query), (start, end) in pairs]
    (folder / name).write_text("".join(lines))
    truth = truth_of(clips)
    wrong = ((i + 1, *truth[i]) for i in range(len(truth)) if labels[i] != truth[i])
    write_csv(folder / "spoiled.csv", ("line", "true_start_s", "true_end_s"), wrong)


def spoil(truth: Sequence[Span], spoil_frac: float, rng: np.random.Generator) -> list[Span]:
    """Moves a share of the intervals to where their IoU with the truth is below MAX_SPOILED_IOU."""
    labels = list(truth)
    for i in sorted(rng.permutation(len(truth))[: round(spoil_frac * len(truth))].tolist()):
        length = truth[i][1] - truth[i][0]
        while temporal_iou(labels[i], truth[i]) >= MAX_SPOILED_IOU:
            start = float(rng.integers(0, DURATION_S - round(length) + 1))
            labels[i] = (start, min(start + length, float(DURATION_S)))
    return labels


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def in_sight(events: Sequence[Event]) -> list[Event]:
    """Those of which enough can be seen to ask for them."""
    return [e for i, e in enumerate(events) if _visible_share(e, events[i + 1 :]) >= MIN_VISIBLE_SHARE]


def _visible_share(event: Event, later: Sequence[Event]) -> float:
    """Share of the object's pixels that no later object covers at any time they share."""
    visible = event.mask
    for other in later:
        if other.start_s < event.end_s and event.start_s < other.end_s:
            visible &= ~other.mask
    return float(visible.sum() / event.mask.sum())


def ensure_clips(
    folder: Path,
    levels: tuple[str, ...] = DEFAULT_LEVELS,
    spoil_frac: float = 0.0,
    num_train: int = SPLIT_CLIPS["train"],
) -> list[str]:
    """Writes the splits that are missing, or made with other arguments or code; returns their names.

    The arguments are the training split's; the evaluation split is always clean and of the default levels.
    """
    code = digest_of(Path(__file__))
    arguments = {"train": (num_train, levels, spoil_frac), "eval": (SPLIT_CLIPS["eval"], DEFAULT_LEVELS, 0.0)}
    written = []
    for split, of_split in arguments.items():
        version, stamp = f"{code} {of_split}", folder / split / "VERSION"
        if not stamp.is_file() or stamp.read_text() != version:
            write_split(folder / split, split, *of_split)
            stamp.write_text(version)
            written.append(split)
    return written


def digest_of(*files: Path) -> str:
    """Of source files: what they write depends on it."""
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
