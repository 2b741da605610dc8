"""What the sequences of a step share, by role: tokens computed against those of separate sequences.

Assumed: a step has the prompts of a mean video, drawn at random where a round selects some, on one actor,
replica and rank, if curriculum.group_by_video, and else prompts of different videos. Several prompts of a
video differ in TEXT_TOKENS; if the question comes before the video, a prompt shares with its rollouts alone.
"""

from dataclasses import dataclass, replace
from math import ceil, inf

from preflight.memory import TEXT_TOKENS
from preflight.packing import TreeSize
from preflight.pools import Pool
from preflight.time import Sizes
from video_opd.config import Config


@dataclass(frozen=True)
class Shared:
    """The sequences of a role: its trees, each of a clip or of a part of its sequences. Means over clips."""

    tree: TreeSize
    sequences: int  # of a step
    separate: float  # tokens of a step, each sequence alone

    @property
    def computed(self) -> float:
        """Tokens of a step."""
        return self.sequences / self.tree.members * self.tree.tokens


def prompts_of_a_clip(config: Config, pool: Pool) -> float:
    """In one step.

    A round that selects a share f of all prompts at random has n f / (1 - (1 - f)^n) of a video with n, if
    any. It selects whole videos with select_by=video, but pool_sample is at random."""
    curriculum, number = config.curriculum, pool.prompts_a_video
    if not curriculum.group_by_video:
        return 1.0
    selected = curriculum.num_selected or curriculum.pool_sample
    if curriculum.select_by == "video":
        selected = curriculum.pool_sample
    if curriculum.kind != "uniform" and selected and pool.num_prompts:
        share = min(1.0, selected / pool.num_prompts)
        number *= share / (1 - (1 - share) ** number)
    return min(number, config.groups_per_step)


def learner_shares(config: Config, pool: Pool) -> Shared:
    """Trees of at most micro_batch sequences and tree_tokens."""
    learner, size, prompts = config.learner, pool.student, prompts_of_a_clip(config, pool)
    responses = config.responses_per_prompt, config.rollout.max_response_tokens
    tree = tree_of(config, size, prompts, *responses, learner.micro_batch, learner.tree_tokens)
    return _shared(config, size, tree)


def teacher_shares(config: Config, pool: Pool) -> Shared:
    """With transformers trees of at most micro_batch sequences of a call; with vLLM what its caches have.

    They also have a prompt's own tokens for its further responses."""
    rollout, size, number = config.rollout, pool.teacher, config.responses_per_prompt
    assert size, "asked only where there is a teacher"
    prompts = prompts_of_a_clip(config, pool)
    if config.loss.needs.rollouts:
        prompts = min(prompts, rollout.prompts_per_result)
    on_vllm, response = config.teacher_engine == "vllm", rollout.max_response_tokens
    most = inf if on_vllm else config.teacher_pool.micro_batch
    tree = tree_of(config, size, prompts, number, response, most)
    if on_vllm:
        own = tree.branches / tree.members - response
        tree = replace(tree, branches=tree.members * (own / number + response))
    return _shared(config, size, tree)


def tree_of(
    config: Config,
    size: Sizes,
    prompts: float,
    number: int = 1,
    response: int = 0,
    most: float = inf,
    most_tokens: int | None = None,
) -> TreeSize:
    """`number` responses to each of `prompts` of a clip, or an equal part of them.

    most: sequences of a pass; most_tokens: its packed tokens."""
    together = prompts if config.video_first else 1.0
    own = min(TEXT_TOKENS, size.tokens) if together > 1 else 0.0
    prefix, branch = size.tokens - own, own + response
    fit = most if most_tokens is None or not branch else min(most, (most_tokens - prefix) // branch)
    of_tree = together * number
    members = of_tree / max(1, ceil(of_tree / max(1.0, fit) - 1e-9))
    clips = 1.0 if config.video_first else min(1.0, members / min(most, prompts * number))
    squared = max(size.squared - 2 * own * size.tokens + own**2, 0.0)
    return TreeSize(prefix, squared, members, members * branch, members * branch**2, clips)


def _shared(config: Config, size: Sizes, tree: TreeSize) -> Shared:
    sequences = config.groups_per_step * config.responses_per_prompt
    return Shared(tree, sequences, sequences * (size.tokens + config.rollout.max_response_tokens))


def describe_sharing(config: Config, pool: Pool) -> str:
    """For people, one line."""
    roles = {"learner": learner_shares(config, pool)}
    if pool.teacher and config.loss.needs.teacher != "none":
        roles["teacher"] = teacher_shares(config, pool)
    prompts, rollouts = prompts_of_a_clip(config, pool), config.responses_per_prompt
    sequences = f"{prompts:.3g} prompts of a clip" if prompts > 1 else "each prompt has its own clip"
    sequences += f", {rollouts} responses to each" if rollouts > 1 else ", one response to each"
    told = [_describe(name, shared) for name, shared in roles.items()]
    return f"shared    in a step {sequences}; tokens computed: {', '.join(told)}"


def _describe(role: str, shared: Shared) -> str:
    saved = 1 - shared.computed / shared.separate
    return f"{role} {shared.computed:,.0f} of {shared.separate:,.0f} ({saved:.0%} saved)"
