"""The ground truth as the student's answer: the responses of the off-policy objectives and of sft."""

from collections.abc import Sequence

import numpy as np

from video_opd.config import Config
from video_opd.models.prompting import PromptEncoder
from video_opd.types import FinishReason, Prompt, Trajectory, TrajectoryGroup


def demonstrations(config: Config, prompts: Sequence[Prompt], step: int) -> list[TrajectoryGroup]:
    """One trajectory for each prompt: its first true span, of sets all, in prompt.answer_template.

    `step` makes the trajectories' ids unique: a prompt returns in every pass.
    """
    encoder = PromptEncoder(config.student, config.prompt, config.video, config.trust_remote_code)
    groups = []
    for prompt in prompts:
        assert prompt.answer_spans_s, "make_plan refuses unlabelled prompts"
        ids = encoder.answer_ids(prompt.answer_spans_s)
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
            predicted_spans_s=config.prompt.answer(prompt.answer_spans_s)[1],
        )
        groups.append(TrajectoryGroup(prompt=prompt, trajectories=(truth,)))
    return groups
