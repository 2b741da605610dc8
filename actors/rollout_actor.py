"""The rollout actor: prompts in, trajectories of the current policy version out."""

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from video_opd.answers import parse_span
from video_opd.config import Config
from video_opd.errors import WeightsLostError
from video_opd.logs import log, start_role_log, work
from video_opd.models.prompting import PromptEncoder
from video_opd.models.vllm_engine import Completion, predict
from video_opd.types import EncodedPrompt, FailedPrompt, Prediction, Prompt, Trajectory, TrajectoryGroup

RolloutResult = TrajectoryGroup | FailedPrompt
Answers = list[Prediction | FailedPrompt]


class RolloutActor:
    """Runs one call at a time, in order of arrival, so that a trajectory comes from one policy version."""

    def __init__(self, name: str, config: Config):
        from actors.engine import PolicyEngine  # not above: the driver imports this file and needs no torch

        start_role_log(config.run_name, name)
        started = time.monotonic()
        self._name, self._config = name, config
        self._encoder = PromptEncoder(config.student, config.prompt, config.video, config.trust_remote_code)
        self._engine = PolicyEngine(config, self._encoder.pad_ids)
        # -1: the folder's weights, before the first publication; None: no whole version
        self._policy_version: int | None = -1
        log.info("started in %.1f s", time.monotonic() - started)

    def __repr__(self) -> str:  # what the Ray dashboard and the log lines show
        return self._name

    def pid(self) -> int:
        return os.getpid()

    def rollout(self, prompts: Sequence[Prompt]) -> Iterator[list[RolloutResult]]:
        """Samples rollouts_per_prompt trajectories a prompt; a FailedPrompt where the clip cannot be read.

        Results come as prompts finish, `rollout.prompts_per_result` at a time. Sampling is seeded by
        config.seed and the trajectory's id. Raises WeightsLostError without a whole version of the weights.
        """
        self._check_whole()
        encoded, failed = self._encoder.encode_readable(prompts)
        ready: list[RolloutResult] = list(failed.values())
        by_id = {p.prompt_id: p for p in prompts}
        numbers = range(self._config.rollout.rollouts_per_prompt)
        ids = [[f"{e.prompt_id}@{self._policy_version}#{i}" for i in numbers] for e in encoded]
        seeds = [[zlib.crc32(f"{self._config.seed}:{t}".encode()) for t in row] for row in ids]
        for place, completions in self._engine.stream(encoded, seeds) if encoded else ():
            prompt = encoded[place]
            named = zip(ids[place], completions, strict=True)
            trajectories = tuple(self._trajectory(prompt, trajectory_id, c) for trajectory_id, c in named)
            ready.append(TrajectoryGroup(prompt=by_id[prompt.prompt_id], trajectories=trajectories))
            if len(ready) >= self._config.rollout.prompts_per_result:
                yield ready
                ready = []
        if ready:
            yield ready

    def predict(self, prompts: Sequence[Prompt], blank_video: bool = False) -> Answers:
        """The greedy answer to each prompt, on grey frames with `blank_video`. Raises WeightsLostError."""
        self._check_whole()
        return predict(self._encoder, self._engine, prompts, blank_video)

    def load_weights(self, policy_version: int, buckets: Sequence[ray.ObjectRef]) -> None:
        """Loads one version from the object store. Raises WeightsLostError unless it is whole."""
        fetched = ray.get(list(buckets), timeout=self._config.request_timeout_s)
        self._policy_version = None  # nothing is sampled from a mixture
        self._engine.load_weights(policy_version, fetched)
        self.update_weight_version(str(policy_version))

    # The learner calls the next four through vLLM's RayVLLMWeightSyncClient, then the driver the fifth.

    def init_weight_transfer_engine(self, request: Any) -> None:
        self._engine.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        self._policy_version = None
        self._engine.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self._engine.update_weights(request)

    def finish_weight_update(self) -> None:
        self._engine.finish_weight_update()

    def update_weight_version(self, policy_version: str) -> None:
        """From now on, samples come from the version that was just loaded."""
        self._policy_version = work.step = int(policy_version)
        log.info("samples from weights %d now", self._policy_version)

    def _check_whole(self) -> None:
        if self._policy_version is None:
            raise WeightsLostError(f"{self._name} holds no whole version of the weights")

    def _trajectory(self, prompt: EncodedPrompt, trajectory_id: str, completion: Completion) -> Trajectory:
        assert self._policy_version is not None
        text = self._encoder.written(completion.text)
        return Trajectory(
            trajectory_id=trajectory_id,
            prompt_id=prompt.prompt_id,
            policy_version=self._policy_version,
            prompt_token_ids=np.asarray(prompt.token_ids),
            prompt_fingerprint=prompt.fingerprint,
            response_token_ids=completion.token_ids,
            actor_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            text=text,
            predicted_span_s=parse_span(text),
        )
