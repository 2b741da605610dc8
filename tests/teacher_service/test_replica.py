"""A replica with the real feed around an encoder and an engine that the tests hold up, by events."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.emulated_teacher import EmulatedTeacher
from teacher_service.calls import Reply
from teacher_service.replica import TeacherReplica
from tests.fakes import make_group, make_prompt
from tests.teacher_service.test_teacher_service import config_with
from video_opd.answers import parse_spans
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.errors import ParityError
from video_opd.models.feed import Feed
from video_opd.types import EncodedPrompt, FailedPrompt, Prompt, TrajectoryGroup

TIMEOUT_S = 60


class Gate(dict):
    """Events by name, made when first asked for."""

    def __missing__(self, name: str) -> threading.Event:
        return self.setdefault(name, threading.Event())

    def wait(self, *names: str) -> None:
        for name in names:
            assert self[name].wait(TIMEOUT_S), f"{name} does not happen"


class Parts:
    """Encoder and engine. `before` is called with the prompts of a pass, `before_encode` with one."""

    def __init__(
        self,
        before: Callable[[list[str]], None] = lambda names: None,
        before_encode: Callable[[str], None] = lambda name: None,
        broken: str = "",
    ):
        self.events, self.num_encoded = Gate(), Counter[str]()
        self.passes: list[list[str]] = []
        self.num_computed_tokens = 1000  # by earlier calls
        self.threads: set[int] = set()
        self._before, self._before_encode, self._broken = before, before_encode, broken
        self.feed = Feed[Prompt](2, 1000, lambda prompt: 100)

    def prepare_ahead(
        self, prompts: Sequence[Prompt], prepare: Callable[[EncodedPrompt], Any]
    ) -> Iterator[Any]:
        return self.feed.ahead(lambda prompt: self._encode(prompt, prepare), prompts)

    def _encode(self, prompt: Prompt, prepare: Callable[[EncodedPrompt], Any]) -> Any:
        self._before_encode(prompt.prompt_id)
        self.num_encoded[prompt.prompt_id] += 1
        if prompt.prompt_id == self._broken:
            return FailedPrompt(prompt_id=prompt.prompt_id, reason="broken")
        (ready,) = EmulatedTeacher().prepare_ahead([prompt], prepare)
        return ready

    def prepare(self, prompt: EncodedPrompt) -> str:
        self.events[f"{prompt.prompt_id} encoded"].set()
        return f"{prompt.prompt_id} prepared"

    def _asked(self, prompts: Sequence[EncodedPrompt], prepared: Sequence[str]) -> None:
        names = [p.prompt_id for p in prompts]
        assert list(prepared) == [f"{name} prepared" for name in names]
        self.passes.append(names)
        self.threads.add(threading.get_ident())
        self._before(names)

    def score(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[np.ndarray],
        prepared: Sequence[str],
        given: Sequence[np.ndarray] | None,
    ) -> list[Any]:
        self._asked(prompts, prepared)
        self.num_computed_tokens += 10 + len(prompts)
        unasked = dict.fromkeys(("hidden", "entropy"))
        pairs = zip(responses, given or [None] * len(responses), strict=True)
        return [SimpleNamespace(logprobs=-r.astype(np.float32), top_k=ids, **unasked) for r, ids in pairs]

    def logprobs(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray], prepared: Sequence[str]
    ) -> list[np.ndarray]:
        self._asked(prompts, prepared)
        return [
            np.full(len(r), float(p.prompt_id[-1]), np.float32)
            for p, r in zip(prompts, responses, strict=True)
        ]

    def predict(
        self,
        prompts: Sequence[EncodedPrompt],
        num_answers: int,
        temperature: float,
        max_tokens: int,
        prepared: Sequence[str],
    ) -> list[list[str]]:
        self._asked(prompts, prepared)
        return [[p.prompt_id] * num_answers for p in prompts]

    def written(self, text: str) -> str:
        return text

    def spans_in(self, text: str, style: str | None) -> tuple:
        return parse_spans(text)


def replica_of(parts: Parts, **pool: Any) -> TeacherReplica:
    class Replica(TeacherReplica):
        def _load(self, config: Config, teacher: TeacherModel) -> Any:
            parts.threads.add(threading.get_ident())
            return parts, parts

    return Replica(config_with(**pool), TeacherModel(name="t", model="m"))


@contextmanager
def busy(replica: TeacherReplica) -> Iterator[None]:
    """The engine's thread has something else to do meanwhile."""
    end = threading.Event()
    replica._thread.submit(end.wait, TIMEOUT_S)
    yield
    end.set()


def group(name: str, lengths: Sequence[int] = (3,), clip: str | None = None) -> TrajectoryGroup:
    made = make_group(name, lengths).group
    trajectories = tuple(replace(t, prompt_fingerprint=name) for t in made.trajectories)
    return replace(made, prompt=make_prompt(name, clip_id=clip), trajectories=trajectories)


async def all_of(*calls: Any) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), TIMEOUT_S)


def check(reply: Reply, groups: Sequence[TrajectoryGroup]) -> None:
    for of_group, asked in zip(reply.results, groups, strict=True):
        for scores, trajectory in zip(of_group, asked.trajectories, strict=True):
            assert scores.trajectory_id == trajectory.trajectory_id
            assert (scores.teacher_logprobs == -trajectory.response_token_ids).all()


@pytest.mark.parametrize("method", ["score", "predict"])
def test_the_next_calls_are_encoded_while_the_engine_works_on_one(method):
    """The engine does not go on until they are."""
    names = ["a", "b", "c"]
    started = asyncio.Event()
    loop: Any = None

    def before(asked: list[str]) -> None:
        loop.call_soon_threadsafe(started.set)
        parts.events.wait("b encoded", "c encoded")

    parts = Parts(before)
    replica = replica_of(parts, micro_batch=1)

    def call(name: str) -> Any:
        if method == "score":
            return asyncio.ensure_future(replica.score([group(name)]))
        return asyncio.ensure_future(replica.predict([make_prompt(name)], 2, 1.0))

    async def go() -> list[Reply]:
        nonlocal loop
        loop = asyncio.get_running_loop()
        first = call("a")
        await asyncio.wait_for(started.wait(), TIMEOUT_S)  # the others arrive while the engine works
        return await all_of(first, call("b"), call("c"))

    replies = asyncio.run(go())
    assert [r.num_calls for r in replies] == [1, 1, 1]
    assert parts.passes == [[name] for name in names]
    assert len(parts.threads) == 1, "an engine starts and works in one thread"


@pytest.mark.parametrize("method", ["score", "predict"])
def test_the_engine_works_on_the_first_prompts_of_a_call_while_the_later_ones_are_encoded(method):
    names = list("abcdef")

    def before(asked: list[str]) -> None:
        parts.events[f"{asked[0]} asked"].set()
        upcoming = names[names.index(asked[-1]) + 1 :][:2]  # of the next pass
        parts.events.wait(*(f"{name} encoded" for name in upcoming))

    def before_encode(name: str) -> None:
        if name == "c":  # the engine has begun by then
            parts.events.wait("a asked")

    parts = Parts(before, before_encode)
    parts.feed = Feed[Prompt](1, 300, lambda prompt: 100)  # the last one of a pass, and the next pass
    replica = replica_of(parts, micro_batch=2)
    groups = [group(name) for name in names]
    work = replica.score(groups) if method == "score" else replica.predict([g.prompt for g in groups], 1, 0.0)
    (reply,) = asyncio.run(all_of(work))
    assert parts.passes == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert len(reply.results) == 6 and parts.feed._free_bytes == 300


def test_calls_that_wait_are_merged_until_they_fill_a_pass_and_no_clip_is_in_two_that_fits_into_one():
    parts = Parts()
    replica = replica_of(parts, micro_batch=4, max_batch_requests=3)
    calls = [
        [group("a", (3, 9), "v"), group("b", clip="w")],
        [group("c", (1, 2), "w"), group("d", clip="v")],
        [group("e", (1,) * 5, "u")],
        [group("f")],
    ]

    async def go() -> list[Reply]:
        with busy(replica):
            waiting = [asyncio.ensure_future(replica.score(groups)) for groups in calls]
            while len(replica._waiting) < len(calls):
                await asyncio.sleep(0)
        return await all_of(*waiting)

    replies = asyncio.run(go())
    assert parts.passes == [["a", "a", "d"], ["b", "c", "c"], ["e"] * 4, ["e"], ["f"]]
    assert [r.num_calls for r in replies] == [2, 2, 1, 1]
    assert [r.computed_tokens for r in replies] == [13 + 13, 13 + 13, 14 + 11, 11]
    assert [r.separate_tokens for r in replies] == [3 + 9 + 3 + 1 + 2 + 3] * 2 + [5, 3]
    for reply, groups in zip(replies, calls, strict=True):
        check(reply, groups)
    assert parts.num_encoded["a"] == 1, "a prompt is encoded once for all its trajectories"


def test_a_prompt_that_returns_in_a_call_is_encoded_once_and_a_broken_one_fails_everywhere():
    parts = Parts(broken="b")
    replica = replica_of(parts, micro_batch=2)
    groups = [group("a", (2,)), group("b", (1, 2)), group("a", (5, 1)), group("b"), group("c", (4,))]
    reply, answers = asyncio.run(
        all_of(replica.score(groups), replica.predict([g.prompt for g in groups], 2, 1.0))
    )
    readable = [0, 2, 4]
    check(reply._replace(results=[reply.results[i] for i in readable]), [groups[i] for i in readable])
    assert all(isinstance(reply.results[i], FailedPrompt) for i in (1, 3))
    assert [[a.text for a in r] if isinstance(r, list) else r.prompt_id for r in answers.results] == [
        ["a", "a"],
        "b",
        ["a", "a"],
        "b",
        ["c", "c"],
    ]
    asyncio.run(all_of(replica.score(groups)))
    assert parts.num_encoded == Counter(a=1 + 2 + 1, b=1 + 2 + 1, c=3)
    assert parts.feed._free_bytes == 1000


def test_the_students_tokens_reach_the_engine_beside_their_responses():
    replica = replica_of(Parts(broken="b"), micro_batch=2)
    replica._are_given = True
    rng, groups = np.random.default_rng(0), []
    for of_prompt in (group("a", (2, 5), "v"), group("b"), group("c", (4,), "w"), group("d", (1, 3), "v")):
        ids = [rng.integers(0, 9, (len(t.response_token_ids), 3)) for t in of_prompt.trajectories]
        pairs = zip(of_prompt.trajectories, ids, strict=True)
        groups.append(replace(of_prompt, trajectories=tuple(replace(t, top_k_ids=of) for t, of in pairs)))
    (reply,) = asyncio.run(all_of(replica.score(groups)))
    assert isinstance(reply.results.pop(1), FailedPrompt) and groups.pop(1)
    for scores, of_prompt in zip(reply.results, groups, strict=True):
        given = [t.top_k_ids for t in of_prompt.trajectories]
        assert all(s.top_k is ids for s, ids in zip(scores, given, strict=True))


def test_a_call_that_is_given_up_is_not_scored_unless_it_was_begun_and_frees_its_bytes():
    begun, end = threading.Event(), threading.Event()

    def before(names: list[str]) -> None:
        begun.set()
        assert end.wait(TIMEOUT_S)

    parts = Parts(before)
    replica = replica_of(parts, micro_batch=1)

    async def go() -> list[Reply]:
        calls = [asyncio.ensure_future(replica.score([group(name)])) for name in ("a", "b", "c")]
        assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
        while len(replica._waiting) < 2:
            await asyncio.sleep(0)
        for given_up in calls[:2]:
            given_up.cancel()
        await asyncio.sleep(0)
        end.set()
        return await all_of(*calls)

    first, second, third = asyncio.run(go())
    assert isinstance(first, asyncio.CancelledError) and isinstance(second, asyncio.CancelledError)
    check(third, [group("c")])
    assert parts.passes == [["a"], ["c"]]
    assert parts.feed._free_bytes == 1000


def test_an_error_reaches_every_call_of_the_batch_and_the_replica_goes_on():
    parts = Parts()
    replica = replica_of(parts, micro_batch=8)
    strange = make_group("a").group  # the actor saw another fingerprint

    async def go() -> list[Any]:
        with busy(replica):
            calls = [asyncio.ensure_future(replica.score([g])) for g in (group("b"), strange)]
            while len(replica._waiting) < 2:
                await asyncio.sleep(0)
        return [*await all_of(*calls), *await all_of(replica.score([group("c")]))]

    first, second, third = asyncio.run(go())
    assert isinstance(first, ParityError) and isinstance(second, ParityError)
    check(third, [group("c")])


def test_the_engines_seconds_do_not_count_the_wait_for_an_encode(monkeypatch):
    """A clock that only encodes and passes move."""
    clock = SimpleNamespace(now=0.0)

    def pass_of(names: list[str]) -> None:
        clock.now += 1.0

    class Slow(Parts):
        def prepare_ahead(
            self, prompts: Sequence[Prompt], prepare: Callable[[EncodedPrompt], Any]
        ) -> Iterator[Any]:
            for prompt in prompts:
                clock.now += 50.0
                yield self._encode(prompt, prepare)

    monkeypatch.setattr("teacher_service.replica.time.perf_counter", lambda: clock.now)
    replica = replica_of(Slow(pass_of), micro_batch=2)
    groups = [group(name) for name in "abc"]
    scored, answered = asyncio.run(
        all_of(replica.score(groups), replica.predict([g.prompt for g in groups], 1, 0.0))
    )
    assert (scored.engine_s, answered.engine_s) == (2.0, 2.0)


def test_a_pass_scores_on_grey_frames_what_is_trained_on_alone(monkeypatch):
    """The middle one of three calls in a pass is for a selection."""
    monkeypatch.setattr(
        "teacher_service.replica.without_video", lambda p: replace(p, prompt_id=f"grey{p.prompt_id}")
    )
    parts = Parts()
    replica = replica_of(parts, micro_batch=8)
    replica._scores_grey = True
    groups = [group("1", (2,)), group("2", (3,)), group("3", (4, 1))]

    async def go() -> list[Reply]:
        with busy(replica):
            calls = [asyncio.ensure_future(replica.score([g], g is groups[1])) for g in groups]
            while len(replica._waiting) < 3:
                await asyncio.sleep(0.01)
        return await all_of(*calls)

    replies = asyncio.run(go())
    assert parts.passes == [["1", "2", "3", "3"], ["grey1", "grey3", "grey3"]]
    for reply, asked, grey in zip(replies, groups, (1, None, 3), strict=True):
        check(reply, [asked])
        for scores in reply.results[0]:
            n = len(scores.teacher_logprobs)
            assert (grey is None) == (scores.grey_logprobs is None)
            assert grey is None or scores.grey_logprobs.tolist() == [float(grey)] * n
    assert replies[0].separate_tokens == (2 + 3 + 4 + 1) + (2 + 4 + 1)
