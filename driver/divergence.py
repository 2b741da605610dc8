"""The student's rollouts on the pool and their scores: how far it is from the teacher on each prompt."""

from collections.abc import Sequence

from actors.rollout_actor import Answers
from curriculum.tvdf import reverse_kl
from driver.run import Run, publish_current
from driver.scoring import ask_teacher
from teacher_service.calls import ScoreResult
from video_opd.passes import CALLS_AN_ENGINE, Arrived, ask_by_video
from video_opd.types import FailedPrompt, Prediction, Prompt, ScoredGroup, TrajectoryGroup


async def scored_rollouts(run: Run, prompts: Sequence[Prompt], arrived: Arrived) -> Answers:
    """One rollout of the current student for each prompt, as an answer with its reverse KL to the teacher.

    They are not trained on: chosen by their own reverse KL, they are no sample of the policy any more.
    """
    await publish_current(run)

    async def ask(call: Sequence[Prompt]) -> Answers:
        found: dict[str, list[Prediction] | FailedPrompt] = {}
        async for reference, results in run.actors.rollout(call, for_selection=True):
            groups = [r for r in results if isinstance(r, TrajectoryGroup)]
            sent = reference if len(groups) == len(results) else groups
            scores = await ask_teacher(run, sent, groups, for_selection=True) if groups else []
            found |= {r.prompt_id: r for r in results if isinstance(r, FailedPrompt)}
            found |= {g.prompt.prompt_id: _answer(g, s) for g, s in zip(groups, scores, strict=True)}
        return [found[prompt.prompt_id] for prompt in call]

    async def at_once() -> int:  # some calls are sampled while others are scored
        return CALLS_AN_ENGINE * (run.actors.num_wanted + run.config.teacher_pool.num_replicas)

    return await ask_by_video(prompts, run.config.rollout.prompts_per_call, ask, at_once, arrived)


def _answer(group: TrajectoryGroup, scores: ScoreResult) -> list[Prediction] | FailedPrompt:
    if isinstance(scores, FailedPrompt):
        return scores
    (rollout,), (of_teacher,) = group.trajectories, ScoredGroup(group=group, scores=scores).scores
    divergence = reverse_kl(rollout.actor_logprobs, of_teacher.teacher_logprobs)
    answer = {"text": rollout.text, "spans_s": rollout.predicted_spans_s, "reverse_kl": divergence}
    return [Prediction(prompt_id=group.prompt.prompt_id, **answer)]
