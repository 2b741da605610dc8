"""The rollout actor: prompts in, trajectories of the current policy version out."""

import os
import time
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import ray

from actors.engine import PolicyEngine
from video_opd.config import Config
from video_opd.prompting import PromptEncoder, parse_span
from video_opd.types import EncodedPrompt, FailedPrompt, Prediction, Prompt, Trajectory, TrajectoryGroup, WeightBucket
from video_opd.vllm_engine import Completion, predict


class RolloutActor:
    """Runs one call at a time, in the order of arrival: a load_weights waits for the rollouts before it, and every
    token of a trajectory comes from one policy version."""

    def __init__(self, name: str, config: Config):
        self._name, self._config = name, config
        self._encoder = PromptEncoder(config.student, config.prompt, config.video)
        self._engine = PolicyEngine(config.student, config.rollout, config.seed, self._encoder.pad_ids)
        self._policy_version = -1  # the folder's weights, before the first publication

    def __repr__(self) -> str:  # what the Ray dashboard and the log lines show
        return self._name

    def pid(self) -> int:
        return os.getpid()

    def rollout(self, prompts: Sequence[Prompt]) -> Iterator[list[TrajectoryGroup | FailedPrompt]]:
        """rollouts_per_prompt trajectories for each prompt, a FailedPrompt where the clip cannot be read.

        Results come as prompts finish, `rollout.prompts_per_result` of them at a time. Sampling is seeded by
        (config.seed, trajectory id): same weights, same trajectories.
        """
        encoded, failed = self._encoder.encode_readable(prompts)
        ready: list[TrajectoryGroup | FailedPrompt] = list(failed.values())
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

    def predict(self, prompts: Sequence[Prompt], blank_video: bool = False) -> list[Prediction | FailedPrompt]:
        """The greedy answer to each prompt; with `blank_video`, to the same prompt on grey frames."""
        return predict(self._encoder, self._engine, prompts, blank_video)

    def load_weights(self, policy_version: int, buckets: Sequence[ray.ObjectRef | WeightBucket]) -> float:
        """Takes one published version; returns the seconds it took."""
        started = time.monotonic()
        whole = [ray.get(b, timeout=self._config.request_timeout_s) if isinstance(b, ray.ObjectRef) else b for b in buckets]
        versions = {b.policy_version for b in whole}
        assert versions == {policy_version}, f"buckets of versions {versions} published as {policy_version}"
        self._engine.load_weights(whole)
        self._policy_version = policy_version
        return time.monotonic() - started

    def _trajectory(self, prompt: EncodedPrompt, trajectory_id: str, completion: Completion) -> Trajectory:
        return Trajectory(
            trajectory_id=trajectory_id,
            prompt_id=prompt.prompt_id,
            policy_version=self._policy_version,
            prompt_token_ids=np.asarray(prompt.token_ids),
            prompt_fingerprint=prompt.fingerprint,
            response_token_ids=completion.token_ids,
            actor_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            text=completion.text,
            predicted_span_s=parse_span(completion.text),
        )
