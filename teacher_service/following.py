"""Which of the student's published versions a teacher that follows it scores with."""

from collections.abc import Sequence
from typing import NamedTuple

import ray


class Weights(NamedTuple):
    """One published version of the student, for a replica to load."""

    policy_version: int
    buckets: Sequence[ray.ObjectRef]  # of WeightBucket; they live while the learner's rank 0 does

    @property
    def name(self) -> str:
        """Its own: a learner that was restarted publishes the same version again, with other weights."""
        return self.buckets[0].hex()


class PublishedVersions:
    """The last versions of the student, as long as a teacher `delay` versions behind may need them.

    Trajectories that are scored are at most max_policy_lag versions older than the newest one, so
    max_policy_lag + delay + 1 versions are kept.
    """

    def __init__(self, delay: int, max_policy_lag: int):
        self._delay, self._num_kept = delay, max_policy_lag + delay + 1
        self._first = 0
        self._kept: dict[int, Weights] = {}

    def add(self, weights: Weights) -> None:
        """Takes the next version, or the first one of a learner that was restarted: the others are lost."""
        version = weights.policy_version
        if not self._kept or version <= max(self._kept):
            self._first, self._kept = version, {}
        self._kept[version] = weights
        self._kept.pop(version - self._num_kept, None)

    def behind(self, policy_version: int) -> Weights:
        """What scores trajectories of this version: max(first, policy_version - delay).

        first: the version with which the learner started, at the start, a resume or a recovery.
        """
        return self._kept[max(self._first, policy_version - self._delay)]
