"""The real rollout actor, teacher replica and learner rank around models that sleep.

All that surrounds a model's passes is real: encoding, parity checks, vLLM's scheduler, DeepSpeed, weights.
"""

import os
from typing import Any

from actors.rollout_actor import RolloutActor
from benchmarks.events import ROLE, record_calls
from learner.rank import LearnerRank
from teacher_service.replica import TeacherReplica
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.models.prompting import PromptEncoder
from video_opd.video import frame_cache

SLEEPS = ROLLOUT, SCORE, UPDATE = "EMULATED_ROLLOUT", "EMULATED_SCORE", "EMULATED_UPDATE"
"""In config.worker_env: the seconds of a prompt in the model of an actor, a replica, a rank."""


def record_inputs(role: str) -> None:
    """Records what this process does to clips and prompts from now on."""
    from transformers import BaseVideoProcessor  # whose call turns frames into patches

    os.environ[ROLE] = role
    record_calls(PromptEncoder, "encode", "encode")
    record_calls(frame_cache, "read_frames", "decode")
    record_calls(BaseVideoProcessor, "__call__", "pixels", has_pixels)


def has_pixels(_: Any, videos: Any, *__: Any, **___: Any) -> bool:
    """Tensors on torch's meta device have a shape alone."""
    return str(getattr(videos[0], "device", "")) != "meta"


class SleepyActor(RolloutActor):
    """vLLM's own engine, whose model sleeps."""

    def __init__(self, name: str, config: Config):
        from benchmarks.emulated_vllm import emulate_vllm

        record_inputs("actor")
        emulate_vllm(ROLLOUT)
        super().__init__(name, config)


class SleepyReplica(TeacherReplica):
    """vLLM's own engine, whose model sleeps."""

    def _load(self, config: Config, teacher: TeacherModel) -> Any:
        from benchmarks.emulated_vllm import emulate_vllm

        record_inputs("teacher")
        emulate_vllm(SCORE)
        return super()._load(config, teacher)


class SleepyRank(LearnerRank):
    """The student, DeepSpeed and the loss are real; the student's layers sleep."""

    def start(self, master: tuple[str, int]) -> None:
        from benchmarks import emulated_learner

        record_inputs("learner")
        emulated_learner.emulate_passes()
        super().start(master)
