"""Which videos the next call of an actor samples: whole ones, into the room that a step has left."""

from collections import deque
from collections.abc import Container

import numpy as np

LOOK_AHEAD = 64  # videos that do not fit, among which others are looked for


def next_videos(
    queue: deque[int],
    room: int,
    per_call: int,
    is_new_step: bool,
    video: np.ndarray,
    dropped: np.ndarray,
    in_flight: Container[int],
) -> list[int]:
    """Takes the places of the prompts of whole videos from the queue; at most `room`.

    A call has at most per_call prompts, or one larger video. A video that does not fit waits, and later ones
    that fit are taken first; a new step begins with the first video, so none waits for ever. When no video
    fits into the rest of a step, a part of the first that waits does; its other prompts come next. A video
    with more prompts than a step is split likewise. A video with a prompt in flight, of an earlier pass,
    waits too.

    video: int64[P]. dropped: of each of the P prompts why it cannot be used, or empty. Returns nothing where
    every video that is left has a prompt in flight.
    """
    issued: list[int] = []
    waiting: list[list[int]] = []
    too_large: list[list[int]] = []
    while queue and len(issued) < room and len(too_large) < LOOK_AHEAD:
        prompts = [i for i in _pop_video(queue, video) if not dropped[i]]
        if any(i in in_flight or i in issued for i in prompts):
            waiting.append(prompts)
        elif len(prompts) <= (min(room, per_call) - len(issued) if issued else room):
            issued += prompts
        else:
            waiting.append(prompts)
            too_large.append(prompts)
            if is_new_step and not issued:
                break
    if too_large and (not issued or room <= per_call):
        part = too_large[0][: room - len(issued)]
        del too_large[0][: len(part)]
        issued += part
    for prompts in reversed(waiting):
        queue.extendleft(reversed(prompts))
    return issued


def _pop_video(queue: deque[int], video: np.ndarray) -> list[int]:
    """The first prompts of the queue that are of one video, and of one pass."""
    prompts = [queue.popleft()]
    while queue and video[queue[0]] == video[prompts[0]] and queue[0] not in prompts:
        prompts.append(queue.popleft())
    return prompts
