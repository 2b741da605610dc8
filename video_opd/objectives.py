"""The inputs that each objective of learner/loss.py needs."""

from dataclasses import dataclass
from typing import Literal

LossKind = Literal["opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft"]


@dataclass(frozen=True)
class Objective:
    """The inputs of one loss.kind."""

    rollouts: bool  # the student's responses; False: the ground truth, written as an answer
    teacher: Literal["none", "logprobs", "top_k", "hidden"]  # of response tokens; each includes the former
    rewards: bool = False  # one per response


OBJECTIVES: dict[LossKind, Objective] = {
    "opd": Objective(rollouts=True, teacher="logprobs"),
    "opd_topk": Objective(rollouts=True, teacher="top_k"),
    "opd_full": Objective(rollouts=True, teacher="hidden"),
    "grpo": Objective(rollouts=True, teacher="none", rewards=True),
    "off_policy_rkd": Objective(rollouts=False, teacher="logprobs"),
    "off_policy_fkd": Objective(rollouts=False, teacher="hidden"),
    "sft": Objective(rollouts=False, teacher="none"),
}
