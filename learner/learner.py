"""The driver's side of the learner."""

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learner.file_transfer import read_parts, write_part
from learner.rank import LearnerRank
from learner.universal import convert
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import LOST, cause_of, started_badly
from video_opd.config import Config
from video_opd.errors import LearnerLostError
from video_opd.types import ScoredGroup, StepReport

NEIGHBOUR_GRACE_S = 15.0


class Learner:
    """Starts the ranks, sends every call to all of them, and bounds every wait.

    Ranks fail as a group: the loss of any is a LearnerLostError, after which `restart` and `load` are due.
    """

    def __init__(self, name: str, config: Config, rank_class: type = LearnerRank):
        self._name, self._config, self._rank_class = name, config, rank_class
        self._num_starts = 0
        self._published: int | None = None  # version of the ranks' weights; None: changed since
        learner = config.learner
        amounts = {"learner": 1, "CPU": learner.num_cpus, "GPU": learner.num_gpus}
        bundle = {resource: float(amount) for resource, amount in amounts.items() if amount}
        self._bundles = placement_group([bundle] * learner.world_size, strategy="PACK")
        self._ranks = self._create()

    def _create(self) -> list[Any]:
        learner, suffix = self._config.learner, f"-{self._num_starts}" if self._num_starts else ""
        self._num_starts += 1
        return [
            ray.remote(self._rank_class)
            .options(
                name=f"{self._name}/learner-{rank}{suffix}",
                num_cpus=learner.num_cpus,
                num_gpus=learner.num_gpus,
                resources={"learner": 1},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._bundles, rank),
                max_restarts=0,
                runtime_env={"env_vars": self._config.worker_env},
            )
            .remote(f"learner-{rank}{suffix}", self._config, rank)
            for rank in range(learner.world_size)
        ]

    async def start(self) -> None:
        addresses = await self._all("address", timeout_s=self._config.start_timeout_s)
        await self._all("start", addresses[0], timeout_s=self._config.start_timeout_s)

    async def restart(self) -> None:
        """Replaces the ranks by new ones, with the student's first weights."""
        self._published = None
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = self._create()
        await self.start()

    def stop(self) -> None:
        """Ends the ranks and releases their resources."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._bundles)

    async def update(self, groups: list[ScoredGroup], step: int) -> StepReport:
        """One optimizer step; the weights after it are version step + 1."""
        self._published = None
        of_ranks = await self._all("update", ray.put(groups), step)
        failed = {f.prompt_id: f for _, of_rank in of_ranks for f in of_rank}
        metrics, _ = of_ranks[0]
        return StepReport(step=step, policy_version=step + 1, metrics=metrics, failed=tuple(failed.values()))

    def holds(self, policy_version: int) -> bool:
        """Whether a call that is made now will find this published version in the ranks."""
        return self._published == policy_version

    async def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        """See LearnerRank.put_weights. The references live while rank 0 does and the caller holds them."""
        self._published = policy_version
        return (await self._all("put_weights", policy_version))[0]

    async def send_weights(self, policy_version: int, actors: list[Any], timeout_s: float) -> int:
        """Sends the weights between GPUs; returns bytes. Raises WeightsLostError when an actor fails."""
        self._published = policy_version
        return (await self._all("send_weights", actors, timeout_s=timeout_s))[0] if actors else 0

    async def save(self, folder: Path) -> None:
        """Writes a checkpoint into an existing folder."""
        await self._write("save", folder, seen_by=folder)

    async def export(self, folder: Path) -> None:
        """Writes the student alone, a transformers folder, into an existing one."""
        await self._write("export", folder, seen_by=folder.parent)

    async def _write(self, method: str, folder: Path, seen_by: Path) -> None:
        """Ranks write `folder`. Files of ranks that do not see the driver's `seen_by` are copied here."""
        elsewhere = await self._ranks_without_folder(seen_by)
        await self._all("remove", folder, ranks=elsewhere)  # remains of an attempt that was lost
        await self._all(method, folder)
        timeout_s, what = self._config.request_timeout_s, "a checkpoint's files"
        for rank in elsewhere:
            with self._losses("read_folder"):
                references = rank.read_folder.options(_generator_backpressure_num_objects=2).remote(folder)
                while reference := await with_deadline(timeout_s, anext(references, None), what):
                    part = await with_deadline(timeout_s, reference, what)
                    await asyncio.to_thread(write_part, folder, part)

    async def load(self, folder: Path, saved_world_size: int | None = None) -> None:
        """Restores weights and optimizer exactly. `saved_world_size`: of the ranks that wrote, if other."""
        self._published = None
        learner = self._config.learner
        # at stage 0 the checkpoint holds the whole optimizer, which any number of ranks can read
        if learner.zero_stage == 0 or saved_world_size in (None, learner.world_size):
            return await self._load(folder, False)
        converted = folder.with_name(f".{folder.name}-universal.tmp")
        shutil.rmtree(converted, ignore_errors=True)
        try:
            await asyncio.to_thread(convert, folder, converted, self._config.start_timeout_s)
            await self._load(converted, True)
        finally:
            shutil.rmtree(converted, ignore_errors=True)

    async def _load(self, folder: Path, universal: bool) -> None:
        elsewhere = await self._ranks_without_folder(folder)
        copied = folder.with_name(f".{folder.name}-{uuid4().hex}.tmp")  # a node may have its own `folder`
        for part in read_parts(folder) if elsewhere else ():
            await self._all("write_part", copied, ray.put(part), ranks=elsewhere)
        await self._all("load", folder, copied, universal)
        await self._all("remove", copied, ranks=elsewhere)

    async def _ranks_without_folder(self, folder: Path) -> list[Any]:
        """One rank of each node that does not see what this process has in `folder`."""
        mark = folder / f".{uuid4().hex}"
        mark.touch()
        try:
            seen = await self._all("sees", mark)
        finally:
            mark.unlink()
        return list({node: r for r, (node, sees) in zip(self._ranks, seen, strict=True) if not sees}.values())

    async def _all(
        self, method: str, *arguments: Any, timeout_s: float | None = None, ranks: Sequence[Any] | None = None
    ) -> list[Any]:
        """Each rank's answer. `ranks`: those to ask; None: all."""
        asked = self._ranks if ranks is None else ranks
        calls = [asyncio.ensure_future(getattr(rank, method).remote(*arguments)) for rank in asked]
        timeout_s = timeout_s or self._config.request_timeout_s
        with self._losses(method):
            try:
                return await with_deadline(timeout_s, asyncio.gather(*calls), f"the learner's {method}")
            except RayTaskError as error:  # a rank whose neighbour died may complain first
                await asyncio.wait(calls, timeout=NEIGHBOUR_GRACE_S)
                if dead := [e for c in calls if c.done() and isinstance(e := c.exception(), LOST)]:
                    raise dead[0] from error
                raise

    @contextmanager
    def _losses(self, method: str) -> Iterator[None]:
        """Turns the loss of a rank into that of the learner."""
        try:
            yield
        except LOST as error:
            if started_badly(error):
                raise
            self._published = None
            raise LearnerLostError(f"the learner's {method} was lost: {cause_of(error)}") from error
