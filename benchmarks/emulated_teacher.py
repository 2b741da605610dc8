"""A teacher that computes nothing: real replicas around an engine that sleeps, and groups for it to score."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.command import make_clip
from teacher_service.replica import TeacherReplica
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.types import EncodedPrompt, FinishReason, Prompt, Trajectory, TrajectoryGroup

CALL_S = "EMULATED_CALL_S"  # in config.worker_env: how many seconds the engine sleeps in a call


class EmulatedTeacher:
    """Encoder and engine in one: ignores the prompt; the log-prob of a token is minus its id."""

    num_computed_tokens = 0

    def prepare_ahead(
        self, prompts: Sequence[Prompt], prepare: Callable[[EncodedPrompt], Any]
    ) -> Iterator[Any]:
        unused: Any = dict.fromkeys(("frames", "frames_digest", "patching", "token_types", "second_per_grid"))
        unused |= {"unexpanded_token_ids": [], "video_metadata": {}, "video_grid_thw": (0, 0, 0)}
        unused["token_ids"] = np.zeros(0, np.int32)
        for prompt in prompts:
            name = prompt.prompt_id
            yield prepare(EncodedPrompt(prompt_id=name, fingerprint=name, **unused))

    def prepare(self, prompt: EncodedPrompt) -> None:
        """Nothing."""

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray], *_: Any) -> list[Any]:
        """Has the fields of engine.TokenScores, whose module imports torch."""
        time.sleep(float(os.environ[CALL_S]))
        unasked = dict.fromkeys(("top_k", "hidden", "entropy"))
        return [SimpleNamespace(logprobs=-r.astype(np.float32), **unasked) for r in responses]


class EmulatedReplica(TeacherReplica):
    """A real replica of an emulated teacher."""

    def _load(self, config: Config, teacher: TeacherModel) -> Any:
        emulated = EmulatedTeacher()
        return emulated, emulated


def make_trajectory(prompt_id: str, version: int, number: int, tokens: Sequence[np.ndarray]) -> Trajectory:
    """What a rollout actor would return; `tokens`: the prompt's and the response's ids."""
    prompt_ids, response_ids = tokens
    return Trajectory(
        trajectory_id=f"{prompt_id}@{version}#{number}",
        prompt_id=prompt_id,
        policy_version=version,
        prompt_token_ids=prompt_ids,
        prompt_fingerprint=prompt_id,  # as EmulatedTeacher encodes the prompt
        response_token_ids=response_ids,
        actor_logprobs=np.zeros(len(response_ids), np.float32),
        finish_reason=FinishReason.STOP,
        text="",
        predicted_spans_s=(),
    )


def make_groups(
    call: int, num_groups: int, rollouts: int, prompt_tokens: int, response_tokens: int
) -> list[TrajectoryGroup]:
    """What a rollout actor returns for one call, with random tokens; prompt ids start with `call`."""
    rng, clip, groups = np.random.default_rng(call), make_clip("clip"), []
    for number in range(num_groups):
        prompt = Prompt(prompt_id=f"{call}-{number}", clip=clip, query="", answer_spans_s=None)
        trajectories = []
        for rollout in range(rollouts):
            tokens = [rng.integers(0, 1000, n, dtype=np.int32) for n in (prompt_tokens, response_tokens)]
            trajectories.append(make_trajectory(prompt.prompt_id, 0, rollout, tokens))
        groups.append(TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories)))
    return groups
