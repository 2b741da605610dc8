"""The driver's side of the learner."""

import asyncio
import shutil
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learner.file_transfer import read_parts, write_part
from learner.rank import LearnerRank
from learner.universal import convert
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import LOST, cause_of, started_badly
from video_opd.config import Config
from video_opd.errors import DeadlineError, LearnerLostError, SaveError
from video_opd.types import ScoredGroup, StepReport

T = TypeVar("T")
NEIGHBOUR_GRACE_S = 15.0
FILE_WORK = ("sees", "remove_unfinished", "save", "export", "write_part", "load")  # methods of the ranks
FILE_WORK_LOST = tuple(error for error in LOST if error is not DeadlineError)  # late is not lost


class Learner:
    """Starts the ranks, sends every call to all of them, and bounds every wait.

    Ranks fail as a group: the loss of any is a LearnerLostError, after which `restart` and `load` are due.
    """

    def __init__(self, name: str, config: Config, rank_class: type = LearnerRank):
        self._name, self._config, self._rank_class = name, config, rank_class
        self._num_starts = 0
        self._turn = asyncio.Lock()  # an actor that joins asks for weights while ranks may be saving
        self._writing: list[Any] = []  # calls of file work that were given up, but may still go on
        self._published: int | None = None  # version of the ranks' weights; None: changed since
        self._bundles: PlacementGroup | None = None  # None: nothing is reserved yet
        self._ranks: list[Any] = []

    def reserve(self) -> None:
        """Reserves the ranks' resources and lets their processes start in the background."""
        learner = self._config.learner
        amounts = {"learner": 1, "CPU": learner.num_cpus, "GPU": learner.num_gpus}
        bundle = {resource: float(amount) for resource, amount in amounts.items() if amount}
        self._bundles = placement_group([bundle] * learner.world_size, strategy="PACK")
        self._ranks = self._create()

    def _create(self) -> list[Any]:
        assert self._bundles, "they are reserved first"
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
        """Returns when every rank is up; reserves first, unless that is done."""
        if self._bundles is None:
            self.reserve()
        addresses = await self._all("address", timeout_s=self._config.start_timeout_s)
        await self._all("start", addresses[0], timeout_s=self._config.start_timeout_s)

    async def restart(self) -> None:
        """Replaces the ranks by new ones, with the student's first weights."""
        self._published, self._writing = None, []
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = self._create()
        await self.start()

    def stop(self) -> None:
        """Ends the ranks and releases their resources."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._bundles:
            remove_placement_group(self._bundles)

    async def update(self, groups: list[ScoredGroup], step: int, baseline: float | None = None) -> StepReport:
        """One optimizer step; its weights are version step + 1. baseline: of rewards, see signals_of."""
        self._published = None
        of_ranks = await self._all("update", ray.put(groups), step, baseline)
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
        """Writes a checkpoint into an existing folder. Raises SaveError; LearnerLostError if a rank died."""
        await self._write("save", folder, seen_by=folder)

    async def export(self, folder: Path) -> None:
        """Writes the student alone, a new transformers folder. Raises as `save` does."""
        await self._write("export", folder, seen_by=folder.parent)

    async def earlier_saves(self) -> None:
        """Waits for ranks that still write although their save had no more time. Raises LearnerLostError."""
        if self._writing:
            with self._losses("earlier save"):
                calls = [asyncio.ensure_future(reference) for reference in self._writing]
                await self._in_time(asyncio.gather(*calls, return_exceptions=True), "earlier save")
            self._writing = []

    async def _write(self, method: str, folder: Path, seen_by: Path) -> None:
        """Ranks write `folder`. Files of ranks that do not see the driver's `seen_by` are copied here."""
        try:
            elsewhere = await self._ranks_without_folder(seen_by)
            await self._all("remove_unfinished", folder.parent, ranks=elsewhere)
            await self._all(method, folder)
            for rank in elsewhere:
                async with self._turn:
                    await self._fetch(rank, folder)
        except (DeadlineError, RayTaskError) as error:
            raise SaveError(cause_of(getattr(error, "cause", error))) from error

    async def _fetch(self, rank: Any, folder: Path) -> None:
        """Copies the rank's `folder` here; takes all parts, since the rank waits until they are taken."""
        failed: OSError | None = None
        with self._losses("read_folder", FILE_WORK_LOST):
            references = rank.read_folder.options(_generator_backpressure_num_objects=2).remote(folder)
            while reference := await self._in_time(anext(references, None), "read_folder"):
                part = await self._in_time(reference, "read_folder")
                try:
                    await asyncio.to_thread(write_part, folder, part)
                except OSError as error:
                    failed = failed or error
        if failed:
            raise failed

    def _in_time(self, call: Awaitable[T], method: str) -> Awaitable[T]:
        """The call with the deadline of reading and writing files."""
        timeout_s = self._config.checkpoint_timeout_s
        return with_deadline(timeout_s, call, f"the learner's {method}", "checkpoint_timeout_s")

    async def load(self, folder: Path, saved_world_size: int | None = None) -> None:
        """Restores weights and optimizer exactly. `saved_world_size`: of the ranks that wrote, if other.

        Raises DeadlineError if it is too slow, and LearnerLostError if a rank died.
        """
        self._published = None
        learner = self._config.learner
        # at stage 0 the checkpoint holds the whole optimizer, which any number of ranks can read
        if learner.zero_stage == 0 or saved_world_size in (None, learner.world_size):
            return await self._load(folder, False)
        converted = folder.with_name(f".{folder.name}-universal.tmp")
        shutil.rmtree(converted, ignore_errors=True)
        try:
            await convert(folder, converted, self._config.checkpoint_timeout_s)
            await self._load(converted, True)
        finally:
            shutil.rmtree(converted, ignore_errors=True)

    async def _load(self, folder: Path, universal: bool) -> None:
        elsewhere = await self._ranks_without_folder(folder)
        copied = folder.with_name(f".{folder.name}-{uuid4().hex}.tmp")  # a node may have its own `folder`
        for part in read_parts(folder) if elsewhere else ():
            await self._all("write_part", copied, ray.put(part), ranks=elsewhere)
        await self._all("load", folder, copied, universal)
        await self._all("remove_unfinished", copied.parent, ranks=elsewhere)

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
        """Each rank's answer, one call after the other. `ranks`: those to ask; None: all."""
        async with self._turn:
            await self.earlier_saves()
            asked = self._ranks if ranks is None else ranks
            references = [getattr(rank, method).remote(*arguments) for rank in asked]
            with self._losses(method, FILE_WORK_LOST if method in FILE_WORK else LOST):
                try:
                    return await self._answers(method, references, timeout_s)
                except DeadlineError:
                    self._writing = references
                    raise

    async def _answers(self, method: str, references: Sequence[Any], timeout_s: float | None) -> list[Any]:
        """Raises the loss of a rank rather than what its neighbours say of it."""
        calls = [asyncio.ensure_future(reference) for reference in references]
        answers = asyncio.gather(*calls)
        try:
            if method in FILE_WORK:
                return await self._in_time(answers, method)
            timeout_s = timeout_s or self._config.request_timeout_s
            return await with_deadline(timeout_s, answers, f"the learner's {method}")
        except RayTaskError as error:  # a rank whose neighbour died may complain first
            await asyncio.wait(calls, timeout=NEIGHBOUR_GRACE_S)
            if dead := [e for c in calls if c.done() and isinstance(e := c.exception(), LOST)]:
                raise dead[0] from error
            raise

    @contextmanager
    def _losses(self, method: str, lost: tuple[type[Exception], ...] = LOST) -> Iterator[None]:
        """Turns the loss of a rank into that of the learner."""
        try:
            yield
        except lost as error:
            if started_badly(error):
                raise
            self._published = None
            self._writing = []
            raise LearnerLostError(f"the learner's {method} was lost: {cause_of(error)}") from error
