"""Clips and models for benchmarks that read real pixels: more of them, and larger ones, than the demo has."""

import csv
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from demo import clips as demo
from video_opd import ROOT

MODELS = ROOT / "demo" / "models"
MAX_TOKENS = 16384  # of a prompt that the models of `write_models` take
QUERIES = [f"the {colour} {shape} is visible" for colour in demo.COLOURS for shape in demo.SHAPES]
HEIGHT, WIDTH, RATE, SECONDS = 360, 640, 30, 32  # of a long clip
SCENES = 40  # of a second each; a long clip shows SECONDS of them in an order of its own
NOISE = 20  # pixels of a square


def write_models(folder: Path) -> list[str]:
    """The demo's student and teacher for prompts of MAX_TOKENS; returns the overrides that name them."""
    longest = {"longest_edge": MAX_TOKENS * 2 * demo.SIZE**2}  # pixels of all frames; a token covers two
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"text_config": {"max_position_embeddings": MAX_TOKENS}},
        "processor_config.json": {"video_processor": {"size": longest}},
        "tokenizer_config.json": {"model_max_length": MAX_TOKENS},
    }
    for name in ("student", "teacher"):
        shutil.copytree(MODELS / name, folder / name)
        for file, values in changes.items():
            path = folder / name / file
            path.write_text(json.dumps(_changed(json.loads(path.read_text()), values)))
    return [f"{name}={folder / name}" for name in ("student", "teacher")]


def _changed(written: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` in place of those of the same keys, at any depth."""
    return written | {k: _changed(written[k], v) if isinstance(v, dict) else v for k, v in values.items()}


def write_demo_clips(folder: Path, num_clips: int, num_queries: int = 1, scale: int = 1) -> list[str]:
    """Clips as the demo's, `scale` times as high and wide; returns the overrides of both splits."""
    rng, names = np.random.default_rng(0), [f"clip{number:05d}" for number in range(num_clips)]
    (folder / "videos").mkdir(parents=True)
    for name in names:
        frames = demo.render(demo.draw_events(demo.LEVELS["colour"], rng), rng)
        demo.write_mp4(folder / "videos" / f"{name}.mp4", frames.repeat(scale, 1).repeat(scale, 2))
    return _write_split(folder, names, num_queries, demo.DURATION_S)


def write_long_clips(folder: Path, num_clips: int, num_queries: int = 1) -> list[str]:
    """Clips of SECONDS in 360p, h264 with B-frames; returns the overrides of both splits."""
    rng, names = np.random.default_rng(0), [f"clip{number:05d}" for number in range(num_clips)]
    (folder / "videos").mkdir(parents=True)
    scenes = folder / "scenes.mp4"
    _write_scenes(scenes, rng)
    for name in names:
        _write_shuffled(folder / "videos" / f"{name}.mp4", scenes, rng.permutation(SCENES)[:SECONDS].tolist())
    return _write_split(folder, names, num_queries, SECONDS)


def _scenes(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """uint8[HEIGHT, WIDTH, 3], RATE for each scene: squares that move over each other."""
    for _ in range(SCENES):
        under, over = rng.integers(0, 256, (2, HEIGHT // NOISE, WIDTH // NOISE, 3), dtype=np.uint8)
        under, over = (squares.repeat(NOISE, 0).repeat(NOISE, 1) for squares in (under, over))
        for i in range(RATE):
            yield np.roll(under, 3 * i, 1) // 2 + np.roll(over, 2 * i, 0) // 2


def _write_scenes(path: Path, rng: np.random.Generator) -> None:
    """Each scene is a group of pictures, which refers to no other."""
    options = {"preset": "veryfast", "crf": "28", "g": str(RATE), "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for picture in _scenes(rng):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_shuffled(path: Path, scenes: Path, order: Sequence[int]) -> None:
    """The scenes of `order`, one after the other, without coding them anew."""
    with av.open(str(scenes)) as source, av.open(str(path), "w") as container:
        shown = source.streams.video[0]
        stream = container.add_stream_from_template(shown)
        packets = [packet for packet in source.demux(shown) if packet.dts is not None]
        starts = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        groups = [packets[a:b] for a, b in itertools.pairwise([*starts, len(packets)])]
        assert shown.time_base
        ticks = round(1 / shown.time_base)  # of a second, as long as a scene
        for place, scene in enumerate(order):
            for packet in groups[scene]:
                assert packet.pts is not None and packet.dts is not None
                moved = av.Packet(bytes(packet))
                moved.stream, moved.time_base = stream, packet.time_base
                moved.is_keyframe, moved.duration = packet.is_keyframe, packet.duration
                later = (place - scene) * ticks
                moved.pts, moved.dts = packet.pts + later, packet.dts + later
                container.mux(moved)


def _write_split(folder: Path, names: Sequence[str], num_queries: int, seconds: int) -> list[str]:
    """The files of a split beside its videos."""
    lines = [f"{name} 1.0 4.0##{query}\n" for name in names for query in QUERIES[:num_queries]]
    (folder / "annotations.txt").write_text("".join(lines))
    rows: Iterable[tuple[str, object]] = [("id", "length"), *((name, float(seconds)) for name in names)]
    with (folder / "lengths.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    splits = itertools.product(("train", "eval"), demo.SPLIT_FILES.items())
    return [f"data.{split}.{key}={folder / name}" for split, (key, name) in splits]
