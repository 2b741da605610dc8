"""The driver's side of the curriculum."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from curriculum.actor import SchedulerActor
from curriculum.coupling import suspend
from curriculum.scheduler import observation
from curriculum.state import NAMED_IN_ERRORS
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import LOST, cause_of, retried
from video_opd.config import Config
from video_opd.errors import FailureKind
from video_opd.grounding import prompt_iou
from video_opd.logs import log
from video_opd.types import FailedPrompt, Prompt, ScoredGroup, TrajectoryGroup

CHANGES_A_STATE = 512


class Curriculum:
    """Calls the scheduler actor `NAME/curriculum`: the scheduler's methods, each with a deadline.

    Calls run one at a time. Those that changed the scheduler since its last saved state are kept. An actor
    that dies or hangs is replaced: the new one loads that state and replays those calls.
    """

    def __init__(self, name: str, pool: Sequence[Prompt | FailedPrompt], config: Config):
        self._name, self._config = name, config
        self._pool = ray.put(pool)
        self._next_prompts_s = 0.0
        self._observed: dict[str, float] = {}
        self._num_starts = 0
        self._num_failed = Counter(dict.fromkeys(FailureKind, 0))
        self._turn = asyncio.Lock()
        self._saved: Mapping[str, Any] | None = None  # None: as created
        self._changes: list[tuple[str, tuple[Any, ...]]] = []  # since then
        self._actor, self._is_lost = self._create(), False

    def _create(self) -> Any:
        name = f"{self._name}/curriculum" + (f"-{self._num_starts}" if self._num_starts else "")
        self._num_starts += 1
        options: dict[str, Any] = {"name": name, "runtime_env": {"env_vars": self._config.worker_env}}
        options |= {"num_cpus": 0, "max_restarts": 0}  # a restart would have an empty state
        return ray.remote(SchedulerActor).options(**options).remote(self._pool, self._config)

    async def _call(self, method: str, *arguments: Any) -> Any:
        call = getattr(self._actor, method).remote(*arguments)
        return await with_deadline(self._config.request_timeout_s, call, f"the curriculum's {method}")

    async def _rebuild(self) -> None:
        ray.kill(self._actor)
        self._actor = self._create()
        if self._saved is not None:
            await self._call("load_state_dict", self._saved)
        for method, arguments in self._changes:
            await self._call(method, *arguments)
        self._is_lost = False

    async def _ask(self, method: str, *arguments: Any) -> Any:
        async def ask() -> Any:
            try:
                if self._is_lost:
                    await self._rebuild()
                return await self._call(method, *arguments)
            except LOST as error:
                if not self._is_lost:
                    log.warning("the curriculum was lost and is rebuilt: %s", cause_of(error))
                self._is_lost = True
                raise

        async with self._turn:
            return await retried(ask, self._config.max_retries, f"the curriculum's {method}")

    async def _change(self, method: str, *arguments: Any) -> Any:
        result = await self._ask(method, *arguments)
        self._changes.append((method, arguments))
        if len(self._changes) >= CHANGES_A_STATE:
            await self.state_dict()
        return result

    def route(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """The part of the group that the teacher scores: without the rollouts that the gate suspends."""
        config = self._config.curriculum
        if not config.suspends or not group.rollouts:  # a demonstration is not gated
            return group
        prompt, reading = group.prompt, config.multi_span_iou
        ious = [prompt_iou(t.predicted_spans_s, prompt, reading) for t in group.trajectories]
        return suspend(group, ious, config.scc.suspend_iou)

    async def to_ask(self, step: int) -> np.ndarray:
        return await self._change("to_ask", step)

    async def not_validated(self, step: int) -> np.ndarray:
        return await self._change("not_validated", step)

    async def validate(self, teacher_iou: np.ndarray, asked: np.ndarray) -> None:
        await self._change("validate", teacher_iou, asked)

    async def start_round(
        self, student_iou: np.ndarray | None, step: int, asked: np.ndarray, reverse_kl: np.ndarray | None
    ) -> int | None:
        return await self._change("start_round", student_iou, step, asked, reverse_kl)

    async def next_selection(self) -> int | None:
        return await self._ask("next_selection")

    async def step_sizes(self, first: int, until: int) -> list[int]:
        return await self._ask("step_sizes", first, until)

    async def next_prompts(self, n: int) -> list[Prompt]:
        started = time.monotonic()
        prompts = await self._change("next_prompts", n)
        self._next_prompts_s += time.monotonic() - started
        return prompts

    async def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        self._observed = await self._change("observe", [observation(g) for g in groups], step)

    async def retire(self, failed: Sequence[FailedPrompt]) -> None:
        self._num_failed.update(failure.kind for failure in failed)
        for failure in failed[:NAMED_IN_ERRORS]:
            log.warning("prompt %s is dropped: %s", failure.prompt_id, failure.reason)
        if (rest := len(failed) - NAMED_IN_ERRORS) > 0:
            log.warning("%d more prompts are dropped: `dropped` of summary.json will say why", rest)
        if failed:
            await self._change("retire", failed)

    async def reissue(self) -> None:
        await self._change("reissue")

    async def records(self) -> pa.Table:
        return await self._ask("records")

    async def state_dict(self) -> dict[str, Any]:
        state = await self._ask("state_dict")
        self._saved, self._changes = state, []
        return state

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._ask("load_state_dict", state)
        self._saved, self._changes = state, []

    async def start_over(self) -> None:
        """Restores the state at the start of the run."""
        async with self._turn:
            self._saved, self._changes, self._is_lost = None, [], True

    def num_failed(self) -> dict[str, int]:
        """Prompts retired by this process so far, by FailureKind."""
        return {kind.value: number for kind, number in self._num_failed.items()}

    def take_metrics(self) -> dict[str, float]:
        """The scheduler's, as it observed a step; seconds that callers waited for next_prompts; restarts."""
        waited, self._next_prompts_s = self._next_prompts_s, 0.0
        starts = float(self._num_starts - 1)
        return {**self._observed, "curriculum/next_prompts_s": waited, "curriculum/lost": starts}
