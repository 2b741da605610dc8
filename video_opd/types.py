"""Every type that crosses a process. Log-probs in nats, times in seconds, sizes in pixels.

Shapes: M prompt tokens (video expanded), N response tokens, K teacher top-K, F frames, H height, W width.
Arrays from Ray's object store are read-only: copy them before torch.from_numpy.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from video_opd.errors import FailureKind

Span = tuple[float, float]
"""(start, end) in seconds from the start of the clip."""


class FinishReason(StrEnum):
    STOP = "stop"  # the response ends with the end token
    LENGTH = "length"  # cut at max_response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The frames to take from a video and their size. FrameCache reads the pixels."""

    clip_id: str
    video_path: str  # a file, or a folder of images
    num_video_frames: int  # of the whole video
    video_fps: float  # of the video; the mean if the rate varies
    duration_s: float  # of the clip
    frame_indices: np.ndarray  # int64[F], ascending, into the video
    frame_size: tuple[int, int]  # (H, W) after resizing
    frame_times_s: np.ndarray | None = None  # float64[F] in the video; None: frame_indices / video_fps
    start_s: float = 0.0  # of the clip in the video
    decode_megapixels: float = 0.0  # frames times pixels, in millions, that are decoded to read it, at most

    @property
    def timestamps_s(self) -> np.ndarray:
        """float64[F]: time of each frame from the start of the clip."""
        times = self.frame_indices / self.video_fps if self.frame_times_s is None else self.frame_times_s
        return times - self.start_s

    @property
    def sampled_fps(self) -> float:
        """Frames per second of the clip that a model sees."""
        return len(self.frame_indices) / self.duration_s

    @property
    def is_plain(self) -> bool:
        """Whether it is a whole video of constant rate: timestamps are frame_indices / video_fps."""
        whole = self.start_s == 0.0 and round(self.duration_s * self.video_fps) == self.num_video_frames
        return self.frame_times_s is None and whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A clip and a query."""

    prompt_id: str
    clip: Clip
    query: str
    answer_spans_s: tuple[Span, ...] | None  # ground truth; None: unlabelled
    source: str = ""  # name of its source in data.train, which is empty unless that is a list
    style: str | None = None  # prompt.style of its source; None: the section prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Patching:
    """How a model's processor makes patches of frames: (pixel - mean) / std of each channel, then blocks."""

    mean: tuple[float, ...]  # of pixels from 0 to 255; all are float32
    std: tuple[float, ...]
    patch_size: int  # pixels
    merge_size: int  # patches along a side of a video token; those of one token follow each other
    temporal_patch_size: int  # frames


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as models see it, made by prompting.PromptEncoder."""

    prompt_id: str
    token_ids: np.ndarray  # int32[M], with timestamps
    unexpanded_token_ids: list[int]  # with one video pad, for vLLM
    frames: np.ndarray  # uint8[F, H, W, 3], RGB
    frames_digest: str  # equal where the frames are
    patching: Patching  # of the frames, for models that take patches
    video_metadata: dict[str, Any]  # second input of both processors
    video_grid_thw: tuple[int, int, int]  # patches along time, height, width
    token_types: np.ndarray  # int32[M], transformers' mm_token_type_ids
    second_per_grid: float | None  # seconds between token grids (Qwen2.5-VL); None: times are text (Qwen3-VL)
    fingerprint: str  # hash of token ids, grid, frame indices and pixels (docs/algorithm.md)
    style: str | None = None  # the prompt's


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One response to one prompt: the student's, or the ground truth written as an answer."""

    trajectory_id: str
    prompt_id: str
    policy_version: int  # of the weights that sampled all its tokens
    prompt_token_ids: np.ndarray  # int32[M], as vLLM expanded them; empty for the ground truth
    prompt_fingerprint: str | None  # EncodedPrompt's in the actor; None for the ground truth
    response_token_ids: np.ndarray  # int32[N], with the end token if it was sampled
    actor_logprobs: np.ndarray  # float32[N], log pi_old of the sampled tokens; zeros for the ground truth
    finish_reason: FinishReason
    text: str
    predicted_spans_s: tuple[Span, ...]  # as written, empty: the answer could not be parsed
    top_k_ids: np.ndarray | None = None  # int32[N, K], the student's likeliest tokens; with top_k_of=student

    @property
    def is_demonstration(self) -> bool:
        """Whether it is the ground truth, which nobody sampled."""
        return self.prompt_fingerprint is None

    def __post_init__(self):
        num_tokens, num_logprobs = len(self.response_token_ids), len(self.actor_logprobs)
        what = f"trajectory {self.trajectory_id}: {num_tokens} response tokens"
        if num_tokens != num_logprobs:
            raise ValueError(f"{what}, {num_logprobs} actor log-probs")
        if self.top_k_ids is not None and len(self.top_k_ids) != num_tokens:
            raise ValueError(f"{what}, {len(self.top_k_ids)} rows of the student's top-K")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHits:
    """What an actor's engine had computed already when it began the answers to a prompt."""

    num_cached_tokens: int  # of the prompts of all answers, in the prefix cache
    was_clip_processed: bool  # for another prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The G trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    cache_hits: CacheHits | None = None  # None: no engine sampled them
    suspended: tuple[Trajectory, ...] = ()  # neither scored nor in the loss (curriculum.scc.gate)

    @property
    def sampled(self) -> tuple[Trajectory, ...]:
        """All trajectories, suspended ones included."""
        return self.trajectories + self.suspended

    @property
    def rollouts(self) -> tuple[Trajectory, ...]:
        """Those that the student sampled, suspended ones included: no demonstration."""
        return tuple(t for t in self.sampled if not t.is_demonstration)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The K likeliest tokens at each response position, most likely first: the teacher's or the student's."""

    ids: np.ndarray  # int32[N, K]
    logprobs: np.ndarray  # float32[N, K], the teacher's


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """What the teacher computed for one trajectory."""

    trajectory_id: str
    teacher_id: str
    teacher_logprobs: np.ndarray  # float32[N], of the response tokens
    top_k: TopK | None
    hidden: np.ndarray | None = None  # float32[N, hidden size], input of the teacher's language-model head
    entropy: np.ndarray | None = None  # float32[N], of the teacher's distribution; None: not available
    grey_logprobs: np.ndarray | None = None  # float32[N], of the response tokens after grey frames


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """The learner's input: a group, scores and rewards in one order. Raises ValueError if they misalign."""

    group: TrajectoryGroup
    scores: tuple[TeacherScores, ...]  # empty without a teacher
    rewards: tuple[float, ...] | None = None  # one per trajectory; None: not wanted, or a demonstration

    def __post_init__(self):
        prompt_id, trajectories = self.group.prompt.prompt_id, self.group.trajectories
        ids, scored = [t.trajectory_id for t in trajectories], [s.trajectory_id for s in self.scores]
        if scored and ids != scored:
            raise ValueError(f"prompt {prompt_id}: trajectories {ids} were scored as {scored}")
        if self.rewards is not None and len(self.rewards) != len(ids):
            raise ValueError(f"prompt {prompt_id}: {len(ids)} trajectories, {len(self.rewards)} rewards")
        for trajectory, score in zip(trajectories, self.scores, strict=False):
            num_tokens, num_logprobs = len(trajectory.response_token_ids), len(score.teacher_logprobs)
            per_token = [score.hidden, score.entropy, score.grey_logprobs]
            per_token += [score.top_k.ids, score.top_k.logprobs] if score.top_k else []
            if {num_logprobs, *(len(v) for v in per_token if v is not None)} != {num_tokens}:
                what = f"trajectory {trajectory.trajectory_id}"
                raise ValueError(f"{what}: {num_tokens} response tokens, {num_logprobs} teacher log-probs")


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPrompt:
    """A prompt that cannot be used, rolled out or scored, mostly because of its clip; dropped and counted."""

    prompt_id: str
    reason: str
    kind: FailureKind = FailureKind.OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A model's answer to a prompt, for evaluation and for the curriculum."""

    prompt_id: str
    text: str
    spans_s: tuple[Span, ...]  # as written, empty: the answer could not be parsed
    reverse_kl: float | None = None  # of student and teacher along it; None: no teacher scored it


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """The cost of one publication."""

    policy_version: int
    num_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The result of one update."""

    step: int
    policy_version: int  # of the weights after the update
    metrics: dict[str, float]
    failed: tuple[FailedPrompt, ...] = ()  # whose clips a rank could not read: their rows had weight 0
