"""Builders of the types that cross processes: valid values, only what a test cares about is passed in."""

from collections.abc import Sequence

import numpy as np

from video_opd.types import (
    Clip,
    FinishReason,
    Prompt,
    ScoredGroup,
    Span,
    TeacherScores,
    TopK,
    Trajectory,
    TrajectoryGroup,
)

FPS = 4.0


def make_clip(clip_id: str = "clip", duration_s: float = 12.0) -> Clip:
    """A reference to a file that does not exist."""
    num_frames = int(duration_s * FPS)
    return Clip(
        clip_id=clip_id,
        video_path=f"/nowhere/{clip_id}.mp4",
        num_video_frames=num_frames,
        video_fps=FPS,
        duration_s=duration_s,
        frame_indices=np.arange(0, num_frames, 2),
        frame_size=(32, 32),
    )


def make_prompt(
    prompt_id: str,
    answers: tuple[Span, ...] | None = ((2.0, 5.0),),
    duration_s: float = 12.0,
    clip_id: str | None = None,
) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        clip=make_clip(clip_id or prompt_id, duration_s),
        query="the red square is visible",
        answer_spans_s=answers,
    )


def make_group(
    prompt_id: str,
    lengths: Sequence[int] = (3,),
    policy_version: int = 0,
    num_prompt_tokens: int = 5,
    top_k: int | None = None,
    seed: int = 0,
    suspended: Sequence[int] = (),
) -> ScoredGroup:
    """One trajectory per entry of `lengths`, with random tokens, log-probs and, if asked for, teacher top-K.

    One more per entry of `suspended`, without scores.
    """
    rng = np.random.default_rng(seed)
    trajectories, scores = [], []
    for number, length in enumerate((*lengths, *suspended)):
        trajectory_id = f"{prompt_id}/{number}"
        trajectories.append(
            Trajectory(
                trajectory_id=trajectory_id,
                prompt_id=prompt_id,
                policy_version=policy_version,
                prompt_token_ids=np.arange(num_prompt_tokens, dtype=np.int32),
                prompt_fingerprint="fingerprint",
                response_token_ids=rng.integers(0, 50, length).astype(np.int32),
                actor_logprobs=-rng.exponential(1.0, length).astype(np.float32),
                finish_reason=FinishReason.STOP,
                text="From 2.0 to 5.0 seconds.",
                predicted_spans_s=((2.0, 5.0),),
            )
        )
        scores.append(
            TeacherScores(
                trajectory_id=trajectory_id,
                teacher_id="teacher",
                teacher_logprobs=-rng.exponential(1.0, length).astype(np.float32),
                top_k=None if top_k is None else _make_top_k(rng, length, top_k),
            )
        )
    active = len(lengths)
    group = TrajectoryGroup(
        prompt=make_prompt(prompt_id),
        trajectories=tuple(trajectories[:active]),
        suspended=tuple(trajectories[active:]),
    )
    return ScoredGroup(group=group, scores=tuple(scores[:active]))


def _make_top_k(rng: np.random.Generator, length: int, k: int, vocabulary: int = 50) -> TopK:
    logits = rng.normal(size=(length, vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1)[:, :k]
    return TopK(ids=ids.astype(np.int32), logprobs=np.take_along_axis(logprobs, ids, -1).astype(np.float32))
