"""One rank of the learner, as a Ray actor."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from learner.file_transfer import FilePart, read_parts, write_part
from video_opd.config import Config
from video_opd.logs import log, start_role_log, work
from video_opd.models.shared_gpu import keep_to_share
from video_opd.types import FailedPrompt, ScoredGroup


class LearnerRank:
    """One rank. Ranks act together: the driver calls the same method on all of them."""

    def __init__(self, name: str, config: Config, rank: int):
        start_role_log(config.run_name, name)
        self._name, self._config, self._rank = name, config, rank
        self._engine: Any = None
        self._sender: Any = None  # a WeightSender, from the first transfer between GPUs on
        self._port: socket.socket | None = None

    def __repr__(self) -> str:
        return self._name

    def address(self) -> tuple[str, int]:
        """This node's address and a port. No other process is given it before rank 0 listens there."""
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        return ray.util.get_node_ip_address(), self._port.getsockname()[1]

    def start(self, master: tuple[str, int]) -> None:
        from learner.engine import LearnerEngine

        keep_to_share(self._config.learner.num_gpus)
        self._engine = LearnerEngine(self._config, self._rank, self._config.learner.world_size, master)
        log.info("started; rank 0 is at %s:%d", *master)

    def update(
        self, groups: list[ScoredGroup], step: int, baseline: float | None = None
    ) -> tuple[dict[str, float], list[FailedPrompt]]:
        """See LearnerEngine.update."""
        work.step = step
        return self._engine.update(groups, step, baseline)

    def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        """Puts the weights into the object store; returns rank 0's references to the buckets, and bytes."""
        references, num_bytes = [], 0
        for bucket in self._engine.buckets(policy_version):
            num_bytes += bucket.num_bytes
            if self._rank == 0:
                references.append(ray.put(bucket))
        return references, num_bytes

    def send_weights(self, actors: list[Any]) -> int:
        """Sends the weights to the actors; see WeightSender.send."""
        from video_opd.weights.transfer import WeightSender  # imports vLLM

        if self._sender is None:
            config = self._config
            shape = (config.learner.world_size, config.rollout.tensor_parallel, config.learner.bucket_bytes)
            self._sender = WeightSender(config.weight_transfer, self._rank, self._engine.parameters, *shape)
        return self._sender.send(self.address(), actors)

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
        """Yields the folder's files, then deletes it."""
        yield from read_parts(folder)
        shutil.rmtree(folder)

    def write_part(self, folder: Path, part: FilePart) -> None:
        write_part(folder, part)

    def remove_unfinished(self, folder: Path) -> None:
        """Removes what was written in `folder` for the driver, which does not see it."""
        for unfinished in folder.glob(".*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
