"""The real rollout actor, teacher replica and learner rank around models that sleep.

All that surrounds a model's passes is real: encoding, parity checks, vLLM's scheduler, DeepSpeed, weights.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.rollout_actor import RolloutActor
from benchmarks.events import ROLE, record_calls
from learner.rank import LearnerRank
from teacher_service.replica import TeacherReplica
from video_opd.config import Config
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt
from video_opd.video import frame_cache

SLEEPS = ROLLOUT, SCORE, UPDATE = "EMULATED_ROLLOUT", "EMULATED_SCORE", "EMULATED_UPDATE"
"""In config.worker_env: the seconds of a prompt in the model of an actor, a replica, a rank."""


def record_inputs(role: str) -> None:
    """Records what this process does to clips and prompts from now on."""
    os.environ[ROLE] = role
    record_calls(PromptEncoder, "encode", "encode")
    record_calls(frame_cache, "read_frames", "decode")
    record_calls(_video_processor(), "__call__", "pixels")


def _video_processor() -> type:
    """Whose call turns frames into patches, on behalf of the encoder or of vLLM."""
    from transformers import BaseVideoProcessor

    return BaseVideoProcessor


class SleepyActor(RolloutActor):
    """vLLM's own engine, whose model sleeps."""

    def __init__(self, name: str, config: Config):
        from benchmarks.emulated_vllm import emulate_vllm

        record_inputs("actor")
        emulate_vllm()
        super().__init__(name, config)


class SleepyReplica(TeacherReplica):
    """The encoder is real."""

    def _load(self, config: Config, model: str) -> Any:
        record_inputs("teacher")
        encoder = PromptEncoder(model, config.prompt, config.video)
        return encoder, SleepyTeacher()


class SleepyTeacher:
    """A scoring engine; the log-prob of every token is 0."""

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[Any]:
        from teacher_service.engine import TokenScores

        time.sleep(float(os.environ[SCORE]) * len(prompts))
        return [TokenScores(np.zeros(len(r), np.float32)) for r in responses]


class SleepyRank(LearnerRank):
    """The student, DeepSpeed and the loss are real; the student's layers sleep."""

    def start(self, master: tuple[str, int]) -> None:
        from benchmarks import emulated_learner

        record_inputs("learner")
        emulated_learner.emulate_passes()
        super().start(master)
