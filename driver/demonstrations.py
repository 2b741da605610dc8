"""The ground truth as an answer: for off-policy objectives, sft, and some prompts with on_policy_frac."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from video_opd.config import Config
from video_opd.models.prompting import PromptEncoder
from video_opd.types import FinishReason, Prompt, Trajectory, TrajectoryGroup


def is_demonstrated(config: Config, prompt: Prompt, step: int) -> bool:
    """Whether the prompt's ground truth takes the place of its rollouts in the update of `step`.

    With probability 1 - on_policy_frac, by a hash of seed, prompt and step: GKD's lambda (arXiv 2306.13649),
    drawn for each prompt instead of each batch.
    """
    if not config.loss.needs.rollouts:
        return True
    digest = hashlib.blake2b(f"{config.seed}:{step}:{prompt.prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >= config.loss.on_policy_frac * 2**64


def demonstrations(config: Config, prompts: Sequence[Prompt], step: int) -> list[TrajectoryGroup]:
    """One trajectory for each prompt: its first true span, of sets all, in prompt.answer_template.

    `step` makes the trajectories' ids unique: a prompt returns in every pass.
    """
    settings: Any = config.student, config.prompt, config.video, config.trust_remote_code
    encoder = _encoder(*settings)
    groups = []
    for prompt in prompts:
        assert prompt.answer_spans_s, "make_plan refuses unlabelled prompts"
        ids = encoder.answer_ids(prompt.answer_spans_s, prompt.style)
        truth = Trajectory(
            trajectory_id=f"{prompt.prompt_id}@{step}#truth",
            prompt_id=prompt.prompt_id,
            policy_version=step,
            prompt_token_ids=np.zeros(0, np.int32),
            prompt_fingerprint=None,
            response_token_ids=ids,
            actor_logprobs=np.zeros(len(ids), np.float32),
            finish_reason=FinishReason.STOP,
            text=encoder.tokenizer.decode(ids, skip_special_tokens=True),
            predicted_spans_s=config.prompt.of_style(prompt.style).answer(prompt.answer_spans_s)[1],
        )
        groups.append(TrajectoryGroup(prompt=prompt, trajectories=(truth,)))
    return groups


_encoder = lru_cache(1)(PromptEncoder)  # every call of an actor may have demonstrations
