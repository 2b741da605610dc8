"""SCC's schedule: at which step each prompt is presented (arXiv 2609.40055 §3.3 and App. B.2)."""

from heapq import heapify, heappop, heappush

import numpy as np
from numpy.random import Generator

from video_opd.config import Config

KNOTS = np.array([1, 20, 40, 60, 79])  # steps of the paper's 79, counted from 1
SHARES = np.array([1.0, 0.7, 0.3, 0.1, 0.05])  # target shares of a full batch at these steps


def target_shares(num_steps: int) -> np.ndarray:
    """float64[num_steps]: of a full batch, linear between the knots, which keep their places in the run."""
    done = np.arange(num_steps) / max(num_steps - 1, 1)
    return np.interp(done, (KNOTS - 1) / (KNOTS[-1] - 1), SHARES)


def step_sizes(num_prompts: int, num_steps: int, full: int, last: int) -> list[int]:
    """Of num_prompts that are presented once: how many at each step, at least 1.

    The number of a step is its share times a common factor, rounded to the nearest, but at most `full`, and
    `last` in the last step. The paper does not name its rounding: ours gives the next prompt to the step with
    the smallest (n + 1/2) / share (Webster's method), the earlier of two.
    """
    least, most = num_steps, full * (num_steps - 1) + last
    assert least <= num_prompts <= most, f"{num_prompts} prompts, {least} to {most} have room"
    rooms, shares, sizes = [*[full] * (num_steps - 1), last], target_shares(num_steps), [1] * num_steps
    order = [(1.5 / share, step) for step, share in enumerate(shares) if rooms[step] > 1]
    heapify(order)
    for _ in range(num_prompts - num_steps):
        _, step = heappop(order)
        sizes[step] += 1
        if sizes[step] < rooms[step]:
            heappush(order, ((sizes[step] + 0.5) / shares[step], step))
    return sizes


def in_order(anchors: np.ndarray, frontier: np.ndarray, sizes: list[int], rng: Generator) -> np.ndarray:
    """int64[sum(sizes)]: the prompts as the steps present them, in random order.

    anchors, frontier: int64[A] and int64[F]. Of the first n prompts the nearest number to n A / (A + F) are
    Anchors, at the end of each step: so every step has its share of both, as far as whole prompts allow.
    """
    ends, total = np.cumsum(sizes), len(anchors) + len(frontier)
    until = (2 * ends * len(anchors) + total) // (2 * total)  # Anchors up to the end of each step
    of_anchors = np.split(rng.permutation(anchors), until[:-1])
    of_frontier = np.split(rng.permutation(frontier), (ends - until)[:-1])
    return np.concatenate([part for of_step in zip(of_anchors, of_frontier, strict=True) for part in of_step])


def make_schedule(
    anchors: np.ndarray, frontier: np.ndarray, config: Config, rng: Generator
) -> tuple[np.ndarray, list[int]]:
    """All prompts of a run in the order of presentation, int64[P + repeats], and how many each step presents.

    Each is presented once, and in the last step the first Frontier prompts of the schedule again.
    """
    room = config.schedule_room
    assert room, "the config has a schedule"
    own = room.last - room.num_repeats
    sizes = step_sizes(len(anchors) + len(frontier), room.num_steps, room.full, own)
    order = in_order(anchors, frontier, sizes, rng)
    done = order[: sum(sizes[: max(0, room.num_steps - 1 - config.max_policy_lag)])]  # before it is sampled
    repeats = done[np.isin(done, frontier)][: room.num_repeats]
    sizes[-1] += len(repeats)
    return np.concatenate([order, repeats]), sizes
