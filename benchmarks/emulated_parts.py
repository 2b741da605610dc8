"""Rollout actors and learner ranks that compute nothing and take a given time: the rest is the loop's own."""

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import ray
import torch

from video_opd.config import Config
from video_opd.types import FinishReason, Prompt, ScoredGroup, Trajectory, TrajectoryGroup
from video_opd.weights.buckets import to_buckets

ROLLOUT_S, UPDATE_S = "EMULATED_ROLLOUT_S", "EMULATED_UPDATE_S"  # of one step's prompts, in worker_env
PROMPT_TOKENS, RESPONSE_TOKENS = 1024, 64
WEIGHT_BYTES = 1 << 20


class EmulatedActor:
    """Samples a step's prompts in ROLLOUT_S seconds, evenly one after the other."""

    def __init__(self, name: str, config: Config):
        self._name, self._config = name, config
        self._policy_version = -1
        self._prompt_s = float(os.environ[ROLLOUT_S]) / config.groups_per_step

    def __repr__(self) -> str:
        return self._name

    def pid(self) -> int:
        return os.getpid()

    def rollout(self, prompts: Sequence[Prompt]) -> Iterator[list[TrajectoryGroup]]:
        size, began = self._config.rollout.prompts_per_result, time.monotonic()
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            time.sleep(max(0.0, began + (first + len(part)) * self._prompt_s - time.monotonic()))
            yield [TrajectoryGroup(prompt=p, trajectories=(self._trajectory(p),)) for p in part]

    def load_weights(self, policy_version: int, buckets: Sequence[ray.ObjectRef]) -> None:
        ray.get(list(buckets), timeout=self._config.request_timeout_s)
        self._policy_version = policy_version

    def _trajectory(self, prompt: Prompt) -> Trajectory:
        return Trajectory(
            trajectory_id=f"{prompt.prompt_id}@{self._policy_version}#0",
            prompt_id=prompt.prompt_id,
            policy_version=self._policy_version,
            prompt_token_ids=np.zeros(PROMPT_TOKENS, np.int32),
            prompt_fingerprint=prompt.prompt_id,  # as the emulated teacher knows it
            response_token_ids=np.zeros(RESPONSE_TOKENS, np.int32),
            actor_logprobs=np.zeros(RESPONSE_TOKENS, np.float32),
            finish_reason=FinishReason.STOP,
            text="",
            predicted_span_s=None,
        )


class EmulatedRank:
    """Updates in UPDATE_S seconds."""

    def __init__(self, name: str, config: Config, rank: int):
        self._update_s = float(os.environ[UPDATE_S])

    def address(self) -> tuple[str, int]:
        return "", 0

    def start(self, master: tuple[str, int]) -> None:
        pass

    def update(self, groups: list[ScoredGroup], step: int) -> dict[str, float]:
        time.sleep(self._update_s)
        return {"learner/loss": 0.0, "learner/grad_norm": 0.0}

    def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        weight = torch.zeros(WEIGHT_BYTES, dtype=torch.uint8)
        (bucket,) = to_buckets([("w", weight)], policy_version, WEIGHT_BYTES)
        return [ray.put(bucket)], WEIGHT_BYTES
