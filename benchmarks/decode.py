"""Clips per second of each decoder, the cost of workers, the gain of the cache, decodes per clip on a node.

`python -m benchmarks.decode [--quick]`: 64 frames, two a second, of 32 s of 360p h264 at 30 frames a second.
A clip is decoded in a worker, decoded in this process, or mapped from the cache, where every byte is read.
The last line is one JSON object.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from benchmarks.command import Row, in_new_process, make_parser, print_result, timed
from video_opd.config_data import VideoConfig
from video_opd.errors import ConfigError
from video_opd.types import Clip
from video_opd.video.clips import frames_key, plan_clip, read_frames
from video_opd.video.decode_pool import shared_pool
from video_opd.video.decoders import DECODERS, load_decoder
from video_opd.video.frame_cache import FrameCache

HEIGHT, WIDTH, RATE, DURATION_S, NUM_FRAMES = 360, 640, 30, 32, 64
MULTIPLE = 8  # divides both sides: frames keep their size, so that decoding alone is measured
# Who reads a clip: every rollout of each query, in an actor, a teacher and a learner.
ROLLOUTS, QUERIES, PROCESSES = 8, 3, 3


def write_clip(path: Path, seed: int) -> None:
    """A smooth moving picture with some noise, which compresses as films do."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(np.cumsum(rng.normal(size=(HEIGHT, WIDTH, 3)), 0), 1)
    picture = (255 * (steps - steps.min()) / np.ptp(steps)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(RATE * DURATION_S):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def plan_clips(videos: Path, decoder: str, cache_dir: Path) -> tuple[VideoConfig, list[Clip]]:
    """Raises ConfigError where the decoder is not installed."""
    sizes = {"fps": 2, "max_frames": NUM_FRAMES, "max_video_tokens": 1 << 24, "cache_bytes": 1 << 33}
    video = VideoConfig.model_validate(sizes | {"decoder": decoder, "cache_dir": str(cache_dir)})
    return video, [plan_clip(path.stem, path, video, MULTIPLE) for path in sorted(videos.iterdir())]


def measure(decoder: str, videos: Path, cache_dir: Path, repeats: int) -> Row:
    """One row: medians over the clips, each the least of `repeats`. The three ways take turns."""
    video, clips = plan_clips(videos, decoder, cache_dir)
    assert len({frames_key(c) for c in clips}) == len(clips) and clips[0].frame_size == (HEIGHT, WIDTH)
    here, cache, frames = load_decoder(decoder), FrameCache(video), (NUM_FRAMES, HEIGHT, WIDTH, 3)
    ways: dict[str, Callable[[Clip], object]] = {
        "in_process": lambda clip: here(clip.video_path).read(clip.frame_indices, np.empty(frames, np.uint8)),
        "worker": lambda clip: read_frames(clip, video),
        "cached": lambda clip: cache.read(clip).max(),
    }
    for clip in clips:  # fills the cache and starts the worker
        cache.read(clip)
    read_frames(clips[0], video)
    seconds = {name: np.full(len(clips), np.inf) for name in ways}
    for _ in range(repeats):
        for name, read in ways.items():
            taken = [timed(read, clip)[0] for clip in clips]
            seconds[name] = np.minimum(seconds[name], taken)
    shared_pool(video).close()
    in_process, worker, cached = (float(np.median(seconds[name])) for name in ways)
    rates = {"clips_per_s": 1 / worker, "frames_per_s": NUM_FRAMES / worker}
    others = {"in_process_clips_per_s": 1 / in_process, "cached_clips_per_s": 1 / cached}
    overhead = float(np.median(seconds["worker"] / seconds["in_process"])) - 1.0
    gains = {"cached_speedup": worker / cached, "subprocess_overhead": overhead}
    return {"backend": decoder} | rates | others | gains


def read_as_a_run_does(videos: Path, cache_dir: Path) -> int:
    """One process of a run: reads every clip for every query and rollout. Returns how many it decoded."""
    video, clips = plan_clips(videos, "decord", cache_dir)
    cache, reads = FrameCache(video), [clip for clip in clips for _ in range(QUERIES * ROLLOUTS)]
    with ThreadPoolExecutor(2) as readers:
        list(readers.map(lambda clip: cache.read(clip).shape, reads))
    return cache.num_decodes


def run(num_clips: int, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (videos := folder / "videos").mkdir()
        for i in range(num_clips):
            write_clip(videos / f"{i}.mp4", i)
        rows = []
        for decoder in DECODERS:
            try:
                rows.append(measure(decoder, videos, folder / "cache", repeats))
            except ConfigError as error:
                print(error)
        with ThreadPoolExecutor(PROCESSES) as threads:  # the processes read at once
            reader = (in_new_process, read_as_a_run_does, videos, folder / "shared")
            decodes = [future.result() for future in [threads.submit(*reader) for _ in range(PROCESSES)]]
    first = {key: rows[0][key] for key in ("cached_speedup", "subprocess_overhead")}
    sizes = {"clips": num_clips, "frames_per_clip": NUM_FRAMES}
    return {"rows": rows, "decodes_per_clip": sum(decodes) / num_clips} | first | sizes


def main() -> None:
    quick = make_parser("decode", __doc__, "2 clips instead of 6").parse_args().quick
    result = run(num_clips=2, repeats=3) if quick else run(num_clips=6, repeats=5)
    decodes = f"{result['decodes_per_clip']:.2f} decodes a clip"
    note = f"{PROCESSES} processes, {QUERIES} queries and {ROLLOUTS} rollouts a clip: {decodes}"
    print_result(result, f"{NUM_FRAMES} frames of {HEIGHT}p h264, one thread", result["rows"], note)


if __name__ == "__main__":
    main()
