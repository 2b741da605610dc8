"""The scheduler actor: which prompts the actors sample next."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from curriculum.tvdf import disagreement, reliable, select_top_k
from video_opd.config import Config, CurriculumConfig
from video_opd.deadline import within
from video_opd.errors import ConfigError, RunError
from video_opd.types import FailedPrompt, Prompt, PromptRecord, ScoredGroup


class Scheduler:
    """Issues the pool in shuffled passes; a prompt in flight is not issued again.

    `uniform` passes over the whole pool, `tvdf` over the prompts that `start_round` selected.
    """

    def __init__(self, prompts: Sequence[Prompt], config: CurriculumConfig, seed: int):
        self._prompts = {p.prompt_id: p for p in prompts}
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._selected = list(self._prompts)
        self._queue: deque[str] = deque()
        self._in_flight: dict[str, None] = {}
        self._dropped: dict[str, str] = {}
        self._num_rollouts = dict.fromkeys(self._prompts, 0)
        self._last_step = dict.fromkeys(self._prompts, -1)
        self._teacher_iou: dict[str, float] = {}
        self._student_iou: dict[str, float] = {}

    def start_round(self, teacher_iou: Mapping[str, float], student_iou: Mapping[str, float]) -> int:
        """TVDF: drops the prompts that the teacher gets wrong, selects those it gets right and the student does not.

        Both map prompt ids to IoUs; a prompt without a teacher IoU is dropped. Returns how many were selected.
        """
        self._teacher_iou, self._student_iou = dict(teacher_iou), dict(student_iou)
        for prompt_id in self._prompts:
            if prompt_id not in teacher_iou or prompt_id not in student_iou:
                self._dropped.setdefault(prompt_id, "no prediction: its clip cannot be read")
        pool = [p for p in self._prompts if p not in self._dropped]
        tau = np.array([teacher_iou[p] for p in pool])
        sigma = np.array([student_iou[p] for p in pool])
        keep = reliable(tau, self._config.teacher_threshold)
        for prompt_id, kept, iou in zip(pool, keep, tau, strict=True):
            if not kept:
                self._dropped[prompt_id] = f"teacher IoU {iou:.3f} is below {self._config.teacher_threshold}"
        kept_ids = [p for p, kept in zip(pool, keep, strict=True) if kept]
        k = self._config.num_selected or len(kept_ids)
        chosen = select_top_k(disagreement(tau[keep], sigma[keep]), k)
        if len(chosen) < k or not len(chosen):
            raise ConfigError(
                f"curriculum: {len(kept_ids)} of {len(self._prompts)} prompts reach teacher_threshold="
                f"{self._config.teacher_threshold}, fewer than the {max(k, 1)} to select: lower the threshold or num_selected"
            )
        self._selected = [kept_ids[i] for i in chosen]
        self._queue.clear()
        return len(self._selected)

    def next_prompts(self, n: int) -> list[Prompt]:
        """The next n prompts, none of them in flight. Raises RunError when fewer are left."""
        issued: list[str] = []
        held_back: list[str] = []
        while len(issued) < n:
            if not self._queue:
                self._refill(n - len(issued))
            prompt_id = self._queue.popleft()
            if prompt_id in self._in_flight:
                held_back.append(prompt_id)
            elif prompt_id not in self._dropped:
                self._in_flight[prompt_id] = None
                issued.append(prompt_id)
        self._queue.extendleft(reversed(held_back))
        return [self._prompts[p] for p in issued]

    def _refill(self, wanted: int) -> None:
        """Queues one more pass over the selected prompts, shuffled."""
        alive = [p for p in self._selected if p not in self._dropped]
        available = [p for p in alive if p not in self._in_flight]
        if len(available) < wanted:
            raise RunError(
                f"the curriculum has {len(available)} prompts that are not in flight, {wanted} more are asked for "
                f"({len(self._dropped)} of {len(self._prompts)} were dropped): add data or lower groups_per_step"
            )
        self._queue.extend(alive[i] for i in self._rng.permutation(len(alive)))

    def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """These groups were trained on at `step`; their prompts are no longer in flight."""
        for group in groups:
            prompt_id = group.group.prompt.prompt_id
            del self._in_flight[prompt_id]
            self._num_rollouts[prompt_id] += len(group.group.trajectories)
            self._last_step[prompt_id] = step

    def retire(self, failed: Sequence[FailedPrompt]) -> None:
        """These prompts' clips cannot be read; they are never issued again."""
        for failure in failed:
            self._in_flight.pop(failure.prompt_id, None)
            self._dropped[failure.prompt_id] = failure.reason

    def records(self) -> list[PromptRecord]:
        """What is known of every prompt, in the order of the pool."""
        selected = set(self._selected)
        return [
            PromptRecord(
                prompt_id=p,
                teacher_iou=self._teacher_iou.get(p),
                student_iou=self._student_iou.get(p),
                num_rollouts=self._num_rollouts[p],
                last_step=self._last_step[p],
                selected=p in selected,
                dropped=self._dropped.get(p, ""),
            )
            for p in self._prompts
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain values; prompts in flight are to be issued again, first."""
        return {
            "records": self.records(),
            "selected": list(self._selected),
            "queue": [*self._in_flight, *self._queue],
            "random_state": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict, on the same pool."""
        for record in state["records"]:
            self._num_rollouts[record.prompt_id] = record.num_rollouts
            self._last_step[record.prompt_id] = record.last_step
            if record.teacher_iou is not None:
                self._teacher_iou[record.prompt_id] = record.teacher_iou
            if record.student_iou is not None:
                self._student_iou[record.prompt_id] = record.student_iou
            if record.dropped:
                self._dropped[record.prompt_id] = record.dropped
        self._selected = list(state["selected"])
        self._queue = deque(state["queue"])
        self._in_flight = {}
        self._rng.bit_generator.state = state["random_state"]

    def metrics(self) -> dict[str, float]:
        return {
            "curriculum/in_flight": len(self._in_flight),
            "curriculum/selected": len(self._selected),
            "curriculum/dropped": len(self._dropped),
            "curriculum/seen_frac": float(np.mean([self._num_rollouts[p] > 0 for p in self._selected])),
        }


class SchedulerActor(Scheduler):
    """The scheduler as the named Ray actor of a run."""

    def __repr__(self) -> str:
        return "curriculum"


class Curriculum:
    """The driver's side of the scheduler actor, `NAME/curriculum`: the same methods, each with a deadline."""

    def __init__(self, name: str, prompts: Sequence[Prompt], config: Config):
        self._timeout_s = config.request_timeout_s
        self._actor = (
            ray.remote(SchedulerActor)
            .options(name=f"{name}/curriculum", num_cpus=0, max_restarts=0, runtime_env={"env_vars": config.worker_env})
            .remote(ray.put(prompts), config.curriculum, config.seed)
        )

    async def _ask(self, method: str, *arguments: Any) -> Any:
        call = asyncio.ensure_future(getattr(self._actor, method).remote(*arguments))
        return await within(self._timeout_s, call, f"the curriculum's {method}")

    async def start_round(self, teacher_iou: Mapping[str, float], student_iou: Mapping[str, float]) -> int:
        return await self._ask("start_round", teacher_iou, student_iou)

    async def next_prompts(self, n: int) -> list[Prompt]:
        return await self._ask("next_prompts", n)

    async def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        await self._ask("observe", groups, step)

    async def retire(self, failed: Sequence[FailedPrompt]) -> None:
        await self._ask("retire", failed)

    async def records(self) -> list[PromptRecord]:
        return await self._ask("records")

    async def state_dict(self) -> dict[str, Any]:
        return await self._ask("state_dict")

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._ask("load_state_dict", state)

    async def metrics(self) -> dict[str, float]:
        return await self._ask("metrics")
