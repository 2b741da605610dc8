"""Clips and frames a second by each decoder, what the workers and the cache cost and save, decodes of a clip on a node.

`python -m benchmarks.decode [--quick]`: 64 frames, two a second, of 32 s of 360p h264 at 30 frames a second. The last line is one
JSON object. cold: decoded in a worker; in_process: by the same decoder here; cached: mapped from the cache and every byte read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from video_opd.config_data import VideoConfig
from video_opd.errors import ConfigError
from video_opd.types import Clip
from video_opd.video.clips import frames_key, plan_clip, read_frames
from video_opd.video.decode_pool import shared_pool
from video_opd.video.decoders import DECODERS, load_decoder
from video_opd.video.frame_cache import FrameCache

HEIGHT, WIDTH, RATE, DURATION_S, NUM_FRAMES = 360, 640, 30, 32, 64
SHAPE = (NUM_FRAMES, HEIGHT, WIDTH, 3)
MULTIPLE = 8  # a divisor of both sides: frames keep their size, so that decoding alone is measured
ROLLOUTS, QUERIES, PROCESSES = (
    8,
    3,
    3,
)  # who reads a clip: a group's rollouts of each query, in an actor, a teacher and a learner


def write_clip(path: Path, seed: int) -> None:
    """A smooth picture that moves, with some noise: compresses as films do."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(np.cumsum(rng.normal(size=(HEIGHT, WIDTH, 3)), 0), 1)
    picture = (255 * (steps - steps.min()) / np.ptp(steps)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(RATE * DURATION_S):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, axis=1), format="rgb24"))
            )
        container.mux(stream.encode())


def config(decoder: str, cache: str) -> VideoConfig:
    sizes = {"fps": 2, "max_frames": NUM_FRAMES, "max_video_tokens": 1 << 24, "cache_bytes": 1 << 33}
    return VideoConfig.model_validate(sizes | {"decoder": decoder, "cache_dir": cache})


def seconds(work: Callable[[Clip], object], clips: Iterable[Clip]) -> np.ndarray:
    """float64[clips]: the wall time of each."""
    taken = []
    for clip in clips:
        started = time.perf_counter()
        work(clip)
        taken.append(time.perf_counter() - started)
    return np.array(taken)


def measure(decoder: str, clips: list[Clip], cache_dir: str, repeats: int) -> dict[str, float]:
    """Seconds a clip, the three ways in turn so that a busy machine is busy for all of them."""
    video = config(decoder, cache_dir)
    here, cache = load_decoder(decoder), FrameCache(video)
    read_frames(clips[0], video)  # the worker is up
    ways: dict[str, Callable[[Clip], object]] = {
        "in_process": lambda clip: here(clip.video_path).read(clip.frame_indices, np.empty(SHAPE, np.uint8)),
        "cold": lambda clip: read_frames(clip, video),
        "cached": lambda clip: cache.read(clip).max(),
    }
    for clip in clips:
        cache.read(clip)
    taken = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            taken[name].append(seconds(work, clips))
    shared_pool(video).close()
    least = {
        name: np.min(times, axis=0) for name, times in taken.items()
    }  # of the repeats: what a busy machine disturbs least
    return {name: float(np.median(times)) for name, times in least.items()} | {
        "overhead": float(np.median(least["cold"] / least["in_process"])) - 1.0
    }


def read_as_a_run_does(folder: str, cache_dir: str) -> None:
    """One process of a run: every clip for every query and rollout. Prints how many it decoded."""
    video = config("decord", cache_dir)
    cache = FrameCache(video)
    clips = [plan_clip(path.stem, path, video, MULTIPLE) for path in sorted(Path(folder).iterdir())]
    with ThreadPoolExecutor(2) as readers:
        list(
            readers.map(
                lambda clip: cache.read(clip).shape, [c for c in clips for _ in range(QUERIES * ROLLOUTS)]
            )
        )
    print(cache.num_decodes)


def decodes_per_clip(folder: Path, cache_dir: str, num_clips: int) -> float:
    """Of several processes that read every clip at once."""
    command = [sys.executable, "-m", "benchmarks.decode", "--reader", str(folder), cache_dir]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    outputs = [reader.communicate()[0] for reader in readers]
    return sum(int(output) for output in outputs) / num_clips


def run(num_clips: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        for i in range(num_clips):
            write_clip(videos / f"{i}.mp4", i)
        rows = []
        for decoder in DECODERS:
            try:
                video = config(decoder, f"{folder}/cache")
                clips = [plan_clip(path.stem, path, video, MULTIPLE) for path in sorted(videos.iterdir())]
            except ConfigError as error:
                print(error)
                continue
            assert len({frames_key(clip) for clip in clips}) == num_clips and clips[0].frame_size == (
                HEIGHT,
                WIDTH,
            )
            taken = measure(decoder, clips, f"{folder}/cache", repeats)
            rows.append(
                {
                    "backend": decoder,
                    "clips_per_s": 1 / taken["cold"],
                    "frames_per_s": NUM_FRAMES / taken["cold"],
                    "in_process_clips_per_s": 1 / taken["in_process"],
                    "cached_clips_per_s": 1 / taken["cached"],
                    "cached_speedup": taken["cold"] / taken["cached"],
                    "subprocess_overhead": taken["overhead"],
                }
            )
        decodes = decodes_per_clip(videos, f"{folder}/shared", num_clips)
    first = {key: rows[0][key] for key in ("cached_speedup", "subprocess_overhead")}
    return {
        "rows": rows,
        "decodes_per_clip": decodes,
        **first,
        "clips": num_clips,
        "frames_per_clip": NUM_FRAMES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 clips instead of 6")
    parser.add_argument("--reader", nargs=2, metavar=("VIDEOS", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        read_as_a_run_does(*arguments.reader)
        return
    result = run(*((2, 3) if arguments.quick else (6, 5)))
    columns = (
        "clips/s",
        "frames/s",
        "in-process clips/s",
        "cached clips/s",
        "cached / decoded",
        "worker's overhead",
    )
    table = Table("decoder", *columns, title=f"{NUM_FRAMES} frames of {HEIGHT}p h264, one thread")
    for row in result["rows"]:
        numbers = [
            f"{row[k]:.1f}"
            for k in ("clips_per_s", "frames_per_s", "in_process_clips_per_s", "cached_clips_per_s")
        ]
        table.add_row(
            row["backend"], *numbers, f"{row['cached_speedup']:.0f}x", f"{row['subprocess_overhead']:.1%}"
        )
    Console().print(table)
    print(
        f"{PROCESSES} processes, {QUERIES} queries and {ROLLOUTS} rollouts a clip: {result['decodes_per_clip']:.2f} decodes a clip"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
