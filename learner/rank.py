"""One rank of the learner, as a Ray actor."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from learner.file_transfer import FilePart, read_parts, write_part
from learner.weight_sender import to_flat
from video_opd.broadcast import BroadcastGroup
from video_opd.config import Config
from video_opd.errors import WeightsLostError
from video_opd.logs import log, start_role_log, work
from video_opd.types import GroupPlace, ScoredGroup


class LearnerRank:
    """One rank. Ranks act together: the driver calls the same method on all of them."""

    def __init__(self, name: str, config: Config, rank: int):
        start_role_log(config.run_name, name)
        self._name, self._config, self._rank = name, config, rank
        self._engine: Any = None
        self._group: BroadcastGroup | None = None

    def __repr__(self) -> str:
        return self._name

    def address(self) -> tuple[str, int]:
        """Where this rank can be met: this node's address and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def start(self, master: tuple[str, int]) -> None:
        from learner.engine import LearnerEngine

        self._engine = LearnerEngine(self._config, self._rank, self._config.learner.world_size, master)
        log.info("started; rank 0 is at %s:%d", *master)

    def update(self, groups: list[ScoredGroup], step: int) -> dict[str, float]:
        work.step = step
        return self._engine.update(groups, step)

    def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        """The weights in the object store, one reference a bucket, and their bytes; rank 0 holds them."""
        references, num_bytes = [], 0
        for bucket in self._engine.buckets(policy_version):
            num_bytes += bucket.num_bytes
            if self._rank == 0:
                references.append(ray.put(bucket))
        return references, num_bytes

    def meet_actors(self, place: GroupPlace | None) -> None:
        """Rank 0 alone: returns when every actor is ready to receive. `place`: of a new group; None: in the last one.

        Raises WeightsLostError when the driver gives the group up.
        """
        if place is not None:
            self._leave_group()
            self._group = BroadcastGroup(place, self._config.request_timeout_s)
        assert self._group, "the first meeting needs a place"
        self._group.meet()

    def send_weights(self, policy_version: int) -> int:
        """Broadcasts the weights to the actors that rank 0 met; returns their bytes.

        Raises WeightsLostError when the group failed. Even then every rank goes through all parameters: each is a
        collective of the learner's own under ZeRO-3, and a rank that left in the middle would hang the others.
        """
        sends = self._rank == 0
        assert self._group or not sends, "rank 0 has met nobody"
        num_bytes, failure = 0, None
        device = self._group.device if self._group else None
        for header, tensors in self._engine.broadcast_buckets(policy_version, device):
            num_bytes += sum(t.nbytes for t in tensors)
            if self._group and failure is None:
                try:
                    self._group.send(header, to_flat(tensors))
                except WeightsLostError as error:
                    failure = error
        if failure:
            self._leave_group()
            raise failure
        return num_bytes

    def _leave_group(self) -> None:
        if self._group:
            self._group.close()
        self._group = None

    def save(self, folder: Path) -> None:
        self._engine.save(folder)
        log.info("saved in %s", folder)

    def export(self, folder: Path) -> None:
        self._engine.export(folder)

    def load(self, folder: Path, brought: Path, universal: bool) -> None:
        """`brought`: a copy of the folder, on nodes that do not see it."""
        self._engine.load(brought if brought.exists() else folder, universal)
        log.info("loaded %s", folder)

    def sees(self, path: Path) -> tuple[str, bool]:
        """This rank's node, and whether the path is there."""
        return ray.get_runtime_context().get_node_id(), path.exists()

    def read_folder(self, folder: Path) -> Iterator[FilePart]:
        """What `folder` holds; it is gone afterwards."""
        yield from read_parts(folder)
        shutil.rmtree(folder)

    def write_part(self, folder: Path, part: FilePart) -> None:
        write_part(folder, part)

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
