"""Prompts of several sources in the shares of their weights: docs/data.md, several sources."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

Shuffle = Callable[[np.ndarray], np.ndarray]  # of places


def apportion(n: int, weights: np.ndarray, drawn: np.ndarray, room: np.ndarray) -> np.ndarray:
    """int64[S]: how many of the next n draws are of each of S sources, at most `room` of each.

    weights: float64[S], above 0. drawn: int64[S], draws before. room: int64[S], together n or more.

    A source's k-th draw has the key (k - 1/2) / weight. Draws come in the order of their keys, of equal ones
    the earlier source's first (Webster's method). With two sources, numbers differ from their shares by at
    most 1/2 after any number of draws.
    """
    sizes = np.minimum(room, n)
    draws = [(drawn[s] + np.arange(size) + 0.5) / weights[s] for s, size in enumerate(sizes)]
    first = np.argsort(np.concatenate(draws), kind="stable")[:n]
    return np.bincount(np.repeat(np.arange(len(weights)), sizes)[first], minlength=len(weights))


class Mixture:
    """Draws places of a pool. Of a source each place comes once before any comes again."""

    def __init__(self, sources: Sequence[str], weights: Mapping[str, float]):
        """sources: of each of the P places. weights: of the sources by name."""
        numbers = {name: number for number, name in enumerate(weights)}
        self._source = np.array([numbers.get(name, -1) for name in sources])  # -1: it cannot be used
        self._weights = np.array(list(weights.values()))
        self._drawn = np.zeros(len(weights), np.int64)
        self._left: list[deque[int]] = [deque() for _ in weights]  # of each source's pass, in order

    def next_pass(self, alive: np.ndarray, shuffle: Shuffle) -> np.ndarray:
        """int64[N]: as many draws as there are places in `alive`, int64[N], of which they are.

        The sources' numbers go on from the passes before; one without alive places is left out.
        shuffle: makes the order of a source's places.
        """
        of_source = self._by_source(alive)
        room = np.array([len(alive) if len(places) else 0 for places in of_source])
        numbers = apportion(len(alive), self._weights, self._drawn, room)
        self._drawn += numbers
        taken = [self._take(s, of_source[s], n, shuffle) for s, n in enumerate(numbers)]
        return np.array([place for of_one in taken for place in of_one], np.int64)

    def select(self, alive: np.ndarray, n: int, rng: Generator) -> np.ndarray:
        """int64[n]: different ones of `alive`; what a source lacks for its share comes from the others."""
        of_source = self._by_source(alive)
        room = np.array([len(places) for places in of_source])
        numbers = apportion(n, self._weights, np.zeros_like(self._drawn), room)
        chosen = [rng.permutation(places)[:k] for places, k in zip(of_source, numbers, strict=True)]
        return np.concatenate(chosen)

    def _by_source(self, places: np.ndarray) -> list[np.ndarray]:
        return [places[self._source[places] == s] for s in range(len(self._weights))]

    def _take(self, s: int, alive: np.ndarray, n: int, shuffle: Shuffle) -> list[int]:
        usable, left, taken = set(alive.tolist()), self._left[s], []
        while len(taken) < n:
            if not left:
                left.extend(shuffle(alive).tolist())
            if (place := left.popleft()) in usable:
                taken.append(place)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.tolist(), "left": [list(left) for left in self._left]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = np.array(state["drawn"], np.int64)
        self._left = [deque(left) for left in state["left"]]
