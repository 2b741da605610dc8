"""Every type that crosses a process.

Shape suffixes: M prompt tokens (video expanded), N response tokens, K teacher top-K, F frames, H height, W width.
Log-probabilities are in nats, times in seconds, sizes in pixels. Arrays that come out of Ray's object store are
read-only: copy before torch.from_numpy.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

Span = tuple[float, float]
"""(start, end) in seconds from the start of the clip."""


class FinishReason(StrEnum):
    STOP = "stop"  # the model ended its answer; the end token is part of the response
    LENGTH = "length"  # cut at max_response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Which frames of which video, at which size. A reference: pixels are read by frame_cache.FrameCache."""

    clip_id: str
    video_path: str  # a file, or a folder of images
    num_video_frames: int  # of the whole video
    video_fps: float  # of the video, frames a second; the mean of a variable rate
    duration_s: float  # of the clip
    frame_indices: np.ndarray  # int64[F], ascending, into the video
    frame_size: tuple[int, int]  # (H, W) after resizing
    frame_times_s: np.ndarray | None = (
        None  # float64[F] in the video; None: a constant rate, frame_indices / video_fps
    )
    start_s: float = 0.0  # of the clip in the video

    @property
    def timestamps_s(self) -> np.ndarray:
        """float64[F]: when each frame is shown, from the start of the clip."""
        times = self.frame_indices / self.video_fps if self.frame_times_s is None else self.frame_times_s
        return times - self.start_s

    @property
    def sampled_fps(self) -> float:
        """Frames that a model sees of a second of the clip."""
        return len(self.frame_indices) / self.duration_s

    @property
    def is_plain(self) -> bool:
        """The whole of a video of constant rate: frame_indices / video_fps are the timestamps."""
        whole = self.start_s == 0.0 and round(self.duration_s * self.video_fps) == self.num_video_frames
        return self.frame_times_s is None and whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A clip and a query. Ground truth validates and selects; it never supervises."""

    prompt_id: str
    clip: Clip
    query: str
    answer_spans_s: tuple[Span, ...] | None  # None: unlabelled


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """What a model sees of a prompt, made by prompting.PromptEncoder alone."""

    prompt_id: str
    token_ids: np.ndarray  # int32[M], the video expanded, timestamps included
    unexpanded_token_ids: list[int]  # one video pad; what vLLM takes
    frames: np.ndarray  # uint8[F, H, W, 3], RGB
    video_metadata: dict[str, Any]  # what both processors take beside the frames
    pixel_values: np.ndarray  # float32[patches, patch_dim], normalised
    video_grid_thw: tuple[int, int, int]  # patches along time, height, width
    token_types: np.ndarray  # int32[M], transformers' mm_token_type_ids
    second_per_grid: (
        float | None
    )  # seconds between the video's token grids: Qwen2.5-VL's clock; Qwen3-VL writes times as text
    fingerprint: str  # of token ids, grid, frame indices and pixels (ALGORITHM.md section 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One response of the student to one prompt."""

    trajectory_id: str
    prompt_id: str
    policy_version: int  # of the weights that sampled every one of its tokens
    prompt_token_ids: np.ndarray  # int32[M], as vLLM expanded them; empty for the ground truth
    prompt_fingerprint: (
        str | None
    )  # None: the ground truth written as an answer, for which no actor saw the prompt
    response_token_ids: np.ndarray  # int32[N], the end token included when it was sampled
    actor_logprobs: np.ndarray  # float32[N], log pi_old of the sampled tokens; zeros for the ground truth
    finish_reason: FinishReason
    text: str
    predicted_span_s: Span | None  # None: the answer could not be parsed

    def __post_init__(self):
        if len(self.response_token_ids) != len(self.actor_logprobs):
            raise ValueError(
                f"trajectory {self.trajectory_id}: {len(self.response_token_ids)} response tokens, "
                f"{len(self.actor_logprobs)} actor log-probs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The G trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    suspended: tuple[
        Trajectory, ...
    ] = ()  # sampled, but neither scored nor in the loss (curriculum.kind=scc)

    @property
    def sampled(self) -> tuple[Trajectory, ...]:
        """All that the student sampled for the prompt."""
        return self.trajectories + self.suspended


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The teacher's K most likely tokens at each response position, most likely first."""

    ids: np.ndarray  # int32[N, K]
    logprobs: np.ndarray  # float32[N, K]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """The teacher's view of one trajectory."""

    trajectory_id: str
    teacher_id: str
    teacher_logprobs: np.ndarray  # float32[N], of the response's tokens
    top_k: TopK | None
    hidden: np.ndarray | None = None  # float32[N, H], what the teacher's language-model head sees
    entropy: np.ndarray | None = (
        None  # float32[N], of the teacher's distribution; None: the engine does not know it
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with what its objective needs, in the same order: the learner's only payload. Alignment is checked here, once."""

    group: TrajectoryGroup
    scores: tuple[TeacherScores, ...]  # empty without a teacher
    rewards: tuple[float, ...] | None = None  # of the trajectories

    def __post_init__(self):
        ids = [t.trajectory_id for t in self.group.trajectories]
        scored = [s.trajectory_id for s in self.scores]
        if scored and ids != scored:
            raise ValueError(
                f"prompt {self.group.prompt.prompt_id}: trajectories {ids} were scored as {scored}"
            )
        if self.rewards is not None and len(self.rewards) != len(ids):
            raise ValueError(
                f"prompt {self.group.prompt.prompt_id}: {len(ids)} trajectories, {len(self.rewards)} rewards"
            )
        if not scored:
            return
        for trajectory, score in zip(self.group.trajectories, self.scores, strict=True):
            sizes = {len(trajectory.response_token_ids), len(score.teacher_logprobs)}
            if score.top_k is not None:
                sizes |= {len(score.top_k.ids), len(score.top_k.logprobs)}
            sizes |= {len(values) for values in (score.hidden, score.entropy) if values is not None}
            if len(sizes) > 1:
                raise ValueError(
                    f"trajectory {trajectory.trajectory_id}: {len(trajectory.response_token_ids)} response tokens, "
                    f"{len(score.teacher_logprobs)} teacher log-probs"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPrompt:
    """A prompt that could not be rolled out or scored because of its clip. It is retired and counted."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One answer of a model to one prompt, for evaluation and for the curriculum."""

    prompt_id: str
    text: str
    span_s: Span | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What one publication cost."""

    policy_version: int
    num_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one update did."""

    step: int
    policy_version: int  # of the weights after the update
    metrics: dict[str, float]
