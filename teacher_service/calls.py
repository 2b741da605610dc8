"""A call on its way to the engine: its prompts are read and encoded while the engine works on other calls."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from teacher_service.following import Weights
from video_opd.models.prompting import check_parity
from video_opd.passes import by_video, passes_by_cut
from video_opd.types import EncodedPrompt, FailedPrompt, Prompt, TeacherScores, Trajectory, TrajectoryGroup

ScoreResult = tuple[TeacherScores, ...] | FailedPrompt


class Reply(NamedTuple):
    """The results of one call, and the cost of the batch it was merged into."""

    results: list[Any]
    engine_s: float  # seconds that the engine worked on the batch
    num_calls: int  # in the batch
    computed_tokens: int = 0  # to score the batch: what its sequences share once
    separate_tokens: int = 0  # of its sequences, each alone
    policy_version: int | None = None  # of the weights that scored it; None: those of the teacher's folder


@dataclass(frozen=True)
class Row:
    """A trajectory to score."""

    place: int  # among the trajectories of its call
    prompt: Prompt
    trajectory: Trajectory


class Ready(NamedTuple):
    """A prompt for the engine."""

    prompt: EncodedPrompt
    prepared: Any  # ScoringEngine.prepare's
    grey: "Ready | None" = None  # the same with grey frames, where it is scored, too


MakeReady = Callable[[Sequence[Prompt]], Iterator[Ready | FailedPrompt]]


class ScoreCall:
    """The trajectories of a call, those of one clip next to each other. Each prompt is encoded once."""

    def __init__(
        self,
        groups: Sequence[TrajectoryGroup],
        make_ready: MakeReady,
        same_view: bool = True,
        weights: Weights | None = None,
    ):
        """Begins to encode. same_view: the prompts are to be those that the actor saw.

        weights: which score it; None: those of the teacher's folder.
        """
        self._same_view, self.weights = same_view, weights
        self.answer: Future[Reply] = Future()
        self._groups = groups
        pairs = [(g.prompt, t) for g in groups for t in g.trajectories]
        self.rows = [Row(i, *pairs[i]) for i in by_video([prompt for prompt, _ in pairs])]
        prompts = {row.prompt.prompt_id: row.prompt for row in self.rows}
        self._num_left = Counter(row.prompt.prompt_id for row in self.rows)
        self._coming = make_ready(list(prompts.values()))
        self._held: dict[str, Ready | FailedPrompt] = {}
        self._scores: dict[int, TeacherScores] = {}

    def ready(self, row: Row) -> Ready | None:
        """The row's prompt, as soon as it is ready; None if its clip cannot be read. Raises ParityError,
        but not for a teacher with a view of its own, of which only the response's tokens are the actor's.

        Each row is asked for once, in their order.
        """
        name = row.prompt.prompt_id
        if name not in self._held:
            self._held[name] = next(self._coming)
        ready = self._held[name]
        if isinstance(ready, FailedPrompt):
            return None
        self._num_left[name] -= 1
        if not self._num_left[name]:
            del self._held[name]
        if self._same_view:
            check_parity(ready.prompt, row.trajectory, "the teacher")
        return ready

    def add(self, row: Row, scores: TeacherScores) -> None:
        self._scores[row.place] = scores

    def results(self) -> list[ScoreResult]:
        """For each group, in order. All rows of clips that can be read have their scores."""
        assert next(self._coming, None) is None  # the feed gets the last prompt's bytes back
        places = iter(range(len(self.rows)))
        results: list[ScoreResult] = []
        for group in self._groups:
            of_group = [next(places) for _ in group.trajectories]
            failed = self._held.get(group.prompt.prompt_id)
            readable = not isinstance(failed, FailedPrompt)
            results.append(tuple(self._scores[i] for i in of_group) if readable else failed)
        return results


def in_passes(calls: Sequence[ScoreCall], size: int) -> list[list[tuple[ScoreCall, Row]]]:
    """The rows of all calls, at most `size` in a pass. No clip is in two passes that fits into one."""
    rows = [(call, row) for call in calls for row in call.rows]
    return [[rows[i] for i in places] for places in passes_by_cut([row.prompt for _, row in rows], size)]
