"""The rollout actor: prompts in, trajectories of the current policy version out."""

import asyncio
import os
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
import ray

from video_opd.cluster.deadline import with_deadline
from video_opd.config import Config
from video_opd.errors import WeightsLostError
from video_opd.hub import on_this_node
from video_opd.logs import log, start_role_log, work
from video_opd.models.engine_loop import Answered, EngineLoop, Request, predict
from video_opd.models.prompting import PromptEncoder
from video_opd.passes import cut_of
from video_opd.types import EncodedPrompt, FailedPrompt, Prediction, Prompt, Trajectory, TrajectoryGroup

RolloutResult = TrajectoryGroup | FailedPrompt
Answers = list[list[Prediction] | FailedPrompt]  # one per prompt
FOR_SELECTION = "selection:"  # apart from the rollouts that are trained on
FOR_ANSWERS = "answers:"


class RolloutActor:
    """Calls overlap: their prompts enter one running engine. New weights wait until it is empty.

    So all tokens of a trajectory come from one policy version: that of the moment when its prompt entered.
    """

    def __init__(self, name: str, config: Config):
        from actors.engine import PolicyEngine  # not above: the driver imports this file and needs no torch

        start_role_log(config.run_name, name)
        started = time.monotonic()
        config = on_this_node(config, teachers=False)
        self._name, self._config = name, config
        self._encoder = PromptEncoder(config.student, config.prompt, config.video, config.trust_remote_code)
        start = partial(PolicyEngine, config, self._encoder.pad_ids)
        self._loop = EngineLoop(start, config.rollout.max_num_seqs)
        self._engine = self._loop.engine
        # -1: the folder's weights, before the first publication; None: no whole version
        self._policy_version: int | None = -1
        log.info("started in %.1f s", time.monotonic() - started)

    def __repr__(self) -> str:  # what the Ray dashboard and the log lines show
        return self._name

    async def pid(self) -> int:
        return os.getpid()

    async def rollout(
        self, prompts: Sequence[Prompt], for_selection: bool = False
    ) -> AsyncIterator[list[RolloutResult]]:
        """Samples rollouts_per_prompt trajectories a prompt; a FailedPrompt where the clip cannot be read.

        for_selection: one a prompt, by another seed than the one that may be trained on at the same version.
        Results come as prompts finish, `rollout.prompts_per_result` or more at a time. Up to that many of one
        clip come together, so that the teacher scores them in one pass. Sampling is seeded by config.seed and
        the first trajectory's id. Raises WeightsLostError without a whole version of the weights.
        """
        by_id, size = {p.prompt_id: p for p in prompts}, self._config.rollout.prompts_per_result
        num_left, of_cut = Counter(map(cut_of, prompts)), defaultdict[Any, list[RolloutResult]](list)
        ready: list[RolloutResult] = []
        number = 1 if for_selection else self._config.rollout.rollouts_per_prompt
        sampling = partial(self._sampling, number, FOR_SELECTION if for_selection else "")
        async with aclosing(self._loop.sample(self._encoder, prompts, sampling)) as results:
            async for result in results:
                is_failed = isinstance(result, FailedPrompt)
                prompt = by_id[result.prompt_id if is_failed else result.prompt.prompt_id]
                cut = cut_of(prompt)
                num_left[cut] -= 1
                of_cut[cut].append(result if is_failed else self._group(prompt, result))
                if num_left[cut] and len(of_cut[cut]) < size:
                    continue
                ready += of_cut.pop(cut)
                if len(ready) >= size:
                    yield ready
                    ready = []
        if ready:
            yield ready

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int, temperature: float, blank_video: bool
    ) -> Answers:
        """`num_answers` to each prompt, on grey frames with `blank_video`; temperature 0: the greedy one.

        Sampling is seeded as in `rollout`. Raises WeightsLostError.
        """
        assert temperature or num_answers == 1, "there is one greedy answer"
        sampling = partial(self._sampling, num_answers, FOR_ANSWERS, temperature=temperature)
        admit = sampling if temperature else self._greedy
        return await predict(self._loop, self._encoder, prompts, blank_video, admit)

    async def load_weights(self, policy_version: int, buckets: Sequence[ray.ObjectRef]) -> None:
        """Loads one version from the object store. Raises WeightsLostError unless it is whole.

        Sampling goes on until the version is here and whole. Raises DeadlineError if it does not come.
        """
        from video_opd.weights.buckets import check_whole

        fetching, what = asyncio.gather(*buckets), f"the fetch of weights {policy_version}"
        fetched = await with_deadline(self._config.request_timeout_s, fetching, what)
        check_whole(fetched, policy_version)
        await self._loop.command(partial(self._load, policy_version, fetched))

    def _load(self, policy_version: int, fetched: Sequence[Any]) -> None:
        self._policy_version = None  # nothing is sampled from a mixture
        self._engine.load_weights(policy_version, fetched)
        self._begin_version(policy_version)

    # The learner calls the next four through vLLM's RayVLLMWeightSyncClient, then the driver one of two.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._loop.command(partial(self._engine.init_weight_transfer_engine, request), drained=False)

    async def start_weight_update(self) -> None:
        """From now on prompts wait, until one of the last two."""
        await self._loop.command(self._start_update)

    def _start_update(self) -> None:
        self._policy_version, self._loop.is_held = None, True
        self._engine.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        await self._loop.command(partial(self._engine.update_weights, request))

    async def finish_weight_update(self) -> None:
        await self._loop.command(self._engine.finish_weight_update)

    async def update_weight_version(self, policy_version: str) -> None:
        """From now on, samples come from the version that was just loaded."""
        await self._loop.command(partial(self._begin_version, int(policy_version)))

    async def abandon_weight_update(self) -> None:
        """Where an update began, it is not to end: prompts that wait raise WeightsLostError.

        Returns when the engine's thread answers: it does not while it hangs in a transfer.
        """
        await self._loop.command(self._release, drained=False)

    def _begin_version(self, policy_version: int) -> None:
        self._policy_version = work.step = policy_version
        self._release()
        log.info("samples from weights %d now", policy_version)

    def _release(self) -> None:
        self._loop.is_held = False

    # The engine's thread calls the next three when a prompt enters.

    def _sampling(
        self, number: int, purpose: str, prompt: EncodedPrompt, temperature: float | None = None
    ) -> Request:
        version = self._whole_version()
        first = _trajectory_id(prompt.prompt_id, version, 0)
        seed = zlib.crc32(f"{self._config.seed}:{purpose}{first}".encode())
        return Request(seed, number, version, temperature)

    def _greedy(self, prompt: EncodedPrompt) -> Request:
        return Request(None, policy_version=self._whole_version())

    def _whole_version(self) -> int:
        if self._policy_version is None:
            raise WeightsLostError(f"{self._name} holds no whole version of the weights")
        return self._policy_version

    def _group(self, prompt: Prompt, answered: Answered) -> TrajectoryGroup:
        encoded, version = answered.prompt, answered.request.policy_version
        trajectories = []
        for number, completion in enumerate(answered.completions):
            text = self._encoder.written(completion.text)
            trajectory = Trajectory(
                trajectory_id=_trajectory_id(prompt.prompt_id, version, number),
                prompt_id=prompt.prompt_id,
                policy_version=version,
                prompt_token_ids=np.asarray(encoded.token_ids),
                prompt_fingerprint=encoded.fingerprint,
                response_token_ids=completion.token_ids,
                actor_logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                text=text,
                predicted_spans_s=self._encoder.spans_in(text, prompt.style),
                top_k_ids=completion.top_k_ids,
            )
            trajectories.append(trajectory)
        hits = answered.cache_hits
        return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), cache_hits=hits)


def _trajectory_id(prompt_id: str, policy_version: int, number: int) -> str:
    return f"{prompt_id}@{policy_version}#{number}"
