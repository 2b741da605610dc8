"""Rollout actors and learner ranks that compute nothing and take a given time: the rest is the loop's own."""

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import ray
import torch

from benchmarks.emulated_teacher import make_trajectory
from video_opd.config import Config
from video_opd.types import FailedPrompt, Prompt, ScoredGroup, TrajectoryGroup
from video_opd.weights.buckets import to_buckets

ROLLOUT_S, UPDATE_S = "EMULATED_ROLLOUT_S", "EMULATED_UPDATE_S"  # of one step's prompts, in worker_env
TOKENS = np.zeros(1024, np.int32), np.zeros(64, np.int32)  # of a prompt and its response
WEIGHT_BYTES = 1 << 20


class EmulatedActor:
    """Samples a step's prompts in ROLLOUT_S seconds, evenly one after the other."""

    def __init__(self, name: str, config: Config):
        self._config = config
        self._policy_version = -1
        self._prompt_s = float(os.environ[ROLLOUT_S]) / config.groups_per_step

    def pid(self) -> int:
        return os.getpid()

    def rollout(
        self, prompts: Sequence[Prompt], for_selection: bool = False
    ) -> Iterator[list[TrajectoryGroup]]:
        size, began = self._config.rollout.prompts_per_result, time.monotonic()
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            time.sleep(max(0.0, began + (first + len(part)) * self._prompt_s - time.monotonic()))
            answers = [make_trajectory(p.prompt_id, self._policy_version, 0, TOKENS) for p in part]
            yield [TrajectoryGroup(prompt=p, trajectories=(a,)) for p, a in zip(part, answers, strict=True)]

    def load_weights(self, policy_version: int, buckets: Sequence[ray.ObjectRef]) -> None:
        ray.get(list(buckets), timeout=self._config.request_timeout_s)
        self._policy_version = policy_version


class EmulatedRank:
    """Updates in UPDATE_S seconds."""

    def __init__(self, name: str, config: Config, rank: int):
        self._update_s = float(os.environ[UPDATE_S])

    def address(self) -> tuple[str, int]:
        return "", 0

    def start(self, master: tuple[str, int]) -> None:
        pass

    def update(
        self, groups: list[ScoredGroup], step: int, baseline: float | None = None
    ) -> tuple[dict[str, float], list[FailedPrompt]]:
        time.sleep(self._update_s)
        return {"learner/loss": 0.0, "learner/grad_norm": 0.0}, []

    def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        weight = torch.zeros(WEIGHT_BYTES, dtype=torch.uint8)
        (bucket,) = to_buckets([("w", weight)], policy_version, WEIGHT_BYTES)
        return [ray.put(bucket)], WEIGHT_BYTES
