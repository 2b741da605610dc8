"""A call on its way to the engine: its prompts are read and encoded while the engine works on other calls."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from video_opd.models.prompting import check_parity
from video_opd.types import EncodedPrompt, FailedPrompt, Prompt, TeacherScores, Trajectory, TrajectoryGroup
from video_opd.video.clips import num_video_tokens

ScoreResult = tuple[TeacherScores, ...] | FailedPrompt
ABOUT_A_TOKEN = 32  # pixels along the side of a video token
Item = TypeVar("Item")


class Reply(NamedTuple):
    """The results of one call, and the cost of the batch it was merged into."""

    results: list[Any]
    engine_s: float  # seconds that the engine worked on the batch
    num_calls: int  # in the batch


@dataclass(frozen=True)
class Row:
    """A trajectory to score."""

    place: int  # among the trajectories of its call
    prompt: Prompt
    trajectory: Trajectory
    num_tokens: int  # of prompt and response; about, for the ground truth


class Ready(NamedTuple):
    """A prompt for the engine."""

    prompt: EncodedPrompt
    prepared: Any  # ScoringEngine.prepare's


MakeReady = Callable[[Sequence[Prompt]], Iterator[Ready | FailedPrompt]]


class ReadyRow(NamedTuple):
    """What the engine needs to score a row, and the call it belongs to."""

    call: "ScoreCall"
    row: Row
    ready: Ready


class ScoreCall:
    """The trajectories of a call, the shortest first. Each prompt is encoded once."""

    def __init__(self, groups: Sequence[TrajectoryGroup], make_ready: MakeReady):
        """Begins to encode."""
        self.answer: Future[Reply] = Future()
        self._groups = groups
        pairs = [(g.prompt, t) for g in groups for t in g.trajectories]
        rows = [Row(i, p, t, _num_tokens(p, t)) for i, (p, t) in enumerate(pairs)]
        self.rows = sorted(rows, key=lambda row: row.num_tokens)  # a pass takes similar lengths
        prompts = {row.prompt.prompt_id: row.prompt for row in self.rows}
        self._num_left = Counter(row.prompt.prompt_id for row in self.rows)
        self._coming = make_ready(list(prompts.values()))
        self._held: dict[str, Ready | FailedPrompt] = {}
        self._scores: dict[int, TeacherScores] = {}

    def ready_rows(self) -> Iterator[ReadyRow]:
        """The rows whose clip can be read, each as soon as its prompt is ready. Raises ParityError."""
        for row in self.rows:
            name = row.prompt.prompt_id
            if name not in self._held:
                self._held[name] = next(self._coming)
            ready = self._held[name]
            if isinstance(ready, FailedPrompt):
                continue
            self._num_left[name] -= 1
            if not self._num_left[name]:
                del self._held[name]
            check_parity(ready.prompt, row.trajectory, "the teacher")
            yield ReadyRow(self, row, ready)

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


def _num_tokens(prompt: Prompt, trajectory: Trajectory) -> int:
    """Known before the prompt is encoded: the actor's prompt ids, which the ground truth lacks."""
    num_prompt = len(trajectory.prompt_token_ids) or num_video_tokens(prompt.clip, ABOUT_A_TOKEN)
    return num_prompt + len(trajectory.response_token_ids)


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, each batch as soon as it is there."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
