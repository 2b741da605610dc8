"""A teacher that computes nothing: real replicas around an engine that sleeps, and groups for it to score."""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command import make_clip
from teacher_service.replica import TeacherReplica
from video_opd.config import Config
from video_opd.types import EncodedPrompt, FinishReason, Prompt, Trajectory, TrajectoryGroup

CALL_S = "EMULATED_CALL_S"  # in config.worker_env: how many seconds the engine sleeps in a call


class EmulatedScores(NamedTuple):
    """engine.TokenScores, whose module imports torch."""

    logprobs: np.ndarray
    top_k: None = None
    hidden: None = None
    entropy: None = None


class EmulatedTeacher:
    """Encoder and engine in one: ignores the prompt; the log-prob of a token is minus its id."""

    def __init__(self, call_s: float):
        self._call_s = call_s

    def encode_all(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        unused: Any = dict.fromkeys(("frames", "pixel_values", "token_types", "second_per_grid"))
        unused |= {"unexpanded_token_ids": [], "video_metadata": {}, "video_grid_thw": (0, 0, 0)}
        ids = np.zeros(0, np.int32)
        return [
            EncodedPrompt(prompt_id=p.prompt_id, token_ids=ids, fingerprint=p.prompt_id, **unused)
            for p in prompts
        ]

    def score(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]
    ) -> list[EmulatedScores]:
        time.sleep(self._call_s)
        return [EmulatedScores(-r.astype(np.float32)) for r in responses]


class EmulatedReplica(TeacherReplica):
    """A real replica of an emulated teacher."""

    def _load(self, config: Config, model: str) -> Any:
        emulated = EmulatedTeacher(float(os.environ[CALL_S]))
        return emulated, emulated


def make_groups(
    call: int, num_groups: int, rollouts: int, prompt_tokens: int, response_tokens: int
) -> list[TrajectoryGroup]:
    """What a rollout actor returns for one call, with random tokens; ids start with `call`."""
    rng = np.random.default_rng(call)
    clip = make_clip("clip")

    def respond(prompt_id: str, number: int) -> Trajectory:
        return Trajectory(
            trajectory_id=f"{prompt_id}#{number}",
            prompt_id=prompt_id,
            policy_version=0,
            prompt_token_ids=rng.integers(0, 1000, prompt_tokens, dtype=np.int32),
            prompt_fingerprint=prompt_id,
            response_token_ids=rng.integers(0, 1000, response_tokens, dtype=np.int32),
            actor_logprobs=np.zeros(response_tokens, np.float32),
            finish_reason=FinishReason.STOP,
            text="",
            predicted_span_s=None,
        )

    prompts = [
        Prompt(prompt_id=f"{call}-{g}", clip=clip, query="", answer_spans_s=None) for g in range(num_groups)
    ]
    return [
        TrajectoryGroup(prompt=p, trajectories=tuple(respond(p.prompt_id, r) for r in range(rollouts)))
        for p in prompts
    ]
