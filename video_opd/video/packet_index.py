"""What the packets of a video stream say about its pictures undecoded, and how far to trust it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers with the time of every packet, from 0
_ONE_TO_ONE = ("h264", "hevc", "vp9", "av1")  # codecs where a packet is a picture


class Picture(NamedTuple):
    """Of a packet or of a decoded frame; times in the stream's unit."""

    pts: int | None
    is_key: bool
    dts: int | None = None


class PacketIndex(NamedTuple):
    pictures: list[Picture]  # of all packets; in order of display if the index is sure
    is_sure: bool  # these are the pictures that the file shows
    is_closed: bool  # and none after a key frame needs one before it, so that every reader can begin there


def read_index(container: Any, stream: Any) -> PacketIndex:
    """Demuxes an av container to its end. Raises ValueError if the stream is empty."""
    packets: list[Picture] = []
    is_whole = begins_anew = True
    codec = stream.codec_context.codec.canonical_name
    is_new_start = _new_start_test(codec, stream.codec_context.extradata or b"")
    for packet in container.demux(stream):
        if packet.size:
            packets.append(Picture(packet.pts, packet.is_keyframe))
            is_whole = is_whole and not (packet.is_discard or packet.is_corrupt)
            begins_anew = begins_anew and (not packet.is_keyframe or is_new_start(bytes(packet)))
    if not packets:
        raise ValueError("it has no frames")
    marks_keys = len(packets) == 1 or not all(p.is_key for p in packets)  # all: nobody looked
    if not is_whole or codec not in _ONE_TO_ONE or container.format.name not in INDEXED or not marks_keys:
        return PacketIndex(packets, False, False)
    pts = np.array([p.pts for p in packets], np.float64)
    later = np.minimum.accumulate(pts[::-1])[::-1]  # the least time from each packet on
    is_key = np.array([p.is_key for p in packets])
    is_sure = is_key[0] and later[0] == pts[0] and len(np.unique(pts)) == len(pts)  # a NaN is later[0] too
    if not is_sure:
        return PacketIndex(packets, False, False)
    is_closed = begins_anew and (later == pts)[is_key].all()
    return PacketIndex(sorted(packets), True, bool(is_closed))


def _new_start_test(codec: str, configuration: bytes) -> Callable[[bytes], bool]:
    """Whether a key packet is a new start, not only a picture that heals: h264 and hevc say so in it."""
    if codec not in ("h264", "hevc"):
        return lambda _: True
    at, shift, mask, starts = (4, 0, 31, (5,)) if codec == "h264" else (21, 1, 63, (19, 20))
    if len(configuration) <= at or configuration[0] != 1:  # packets are not in the form of mp4 and mkv
        return lambda _: False
    width = (configuration[at] & 3) + 1
    return lambda data: any(first >> shift & mask in starts for first in _first_bytes(data, width))


def _first_bytes(data: bytes, width: int) -> Iterator[int]:
    """Of the units of a packet, each after its length in `width` bytes."""
    at = 0
    while at + width < len(data):
        yield data[at + width]
        at += width + int.from_bytes(data[at : at + width], "big")
