"""Videos that are not plain: written with PyAV, some patched byte by byte."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 30


def write_video(
    path: Path,
    frames: np.ndarray,
    rate: int = RATE,
    times_ms: np.ndarray | None = None,
    key_gap: int | None = None,
) -> None:
    """Frames at a constant rate, or each at its own time in milliseconds. h264 has B-frames."""
    options = {"crf": "18", "preset": "veryfast"}
    options |= {"g": str(key_gap), "sc_threshold": "0"} if key_gap else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if times_ms is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = int(times_ms[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def set_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Sets the display matrix (a, b, c, d), in 65536ths, in the track header of an mp4 or mov."""
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    numbers = (a, b, 0, c, d, 0, 0, 0, 0x40000000)
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    path.write_bytes(data)


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_over_reporting(path: Path, frames: np.ndarray) -> None:
    """VP8 in WebM whose second half is frames that are never shown: twice as many packets as pictures."""
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream(
            "libvpx", rate=RATE, options={"lag-in-frames": "0", "auto-alt-ref": "0"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        packets = [
            p for f in frames for p in stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))
        ] + list(stream.encode())
        for number, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            if number >= len(packets) // 2:
                data[0] &= ~0x10  # show_frame
            hidden = av.Packet(bytes(data))
            hidden.stream, hidden.time_base, hidden.is_keyframe = stream, packet.time_base, packet.is_keyframe
            hidden.pts, hidden.dts, hidden.duration = packet.pts, packet.dts, packet.duration
            container.mux(hidden)


def write_images(folder: Path, frames: np.ndarray, first: int = 1) -> None:
    """frame_00001.png and so on; lossless."""
    folder.mkdir()
    for number, pixels in enumerate(frames, first):
        with av.open(str(folder / f"frame_{number:05d}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())


def noise(num_frames: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """uint8[num_frames, height, width, 3]: every frame is another picture."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
