"""The engine's thread: nothing is encoded in front of it, and its weights change when it is empty."""

import asyncio
import random
import threading
import time
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from tests.engines import MOST, TIMEOUT_S, FakeEncoder, FakeEngine, wait_for
from tests.fakes import make_prompt
from video_opd.models.engine_loop import EngineLoop, Request
from video_opd.types import FailedPrompt


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def loop(engine):
    loop: Any = EngineLoop(lambda: engine, MOST)  # pyright: ignore[reportArgumentType]
    yield loop
    loop.close()


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, TIMEOUT_S))


async def answers(loop, encoder, *names: str, num_answers: int = 1) -> dict[str, Any]:
    """By prompt id the versions that answered, or why there are none."""
    found: dict[str, Any] = {}
    request = Request(7, num_answers)
    async for result in loop.sample(encoder, [make_prompt(n) for n in names], lambda _: request):
        if isinstance(result, FailedPrompt):
            found[result.prompt_id] = result.reason
        else:
            found[result.prompt.prompt_id] = result.completions
    return found


async def until(is_so) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def test_the_next_prompts_are_encoded_while_the_engine_answers_and_enter_it_before_it_has(loop, engine):
    """The second is encoded when the engine has begun the first, whose answer takes until the second enters.

    So does the first of another call, with the second of this one."""
    begun = {"b": threading.Event(), "c": threading.Event()}
    engine.num_steps = 1

    def encode(name: str) -> None:
        if name in begun:
            wait_for(begun[name])

    def before_step() -> None:
        seen = {name for name, _ in engine.entered}
        if seen == {"a"}:
            begun["b"].set()
        elif seen == {"a", "b"}:
            begun["c"].set()
        if len(seen) < 3:
            for request in engine.inside.values():
                request.left += 1  # it goes on

    engine.before_step = before_step
    encoder = FakeEncoder(encode)

    async def test() -> None:
        first, second = await asyncio.gather(answers(loop, encoder, "a", "b"), answers(loop, encoder, "c"))
        assert first == {"a": [0], "b": [0]} and second == {"c": [0]}

    run(test())
    assert engine.thread is loop._thread and engine.most == 3, "all were in it at once"


def test_the_oldest_call_comes_first_and_no_more_enter_than_may_be_under_way(loop, engine):
    many = [f"a{i}" for i in range(9)]

    async def test() -> None:
        loop.is_held = True
        calls = [asyncio.ensure_future(answers(loop, FakeEncoder(), *many, num_answers=2))]
        await asyncio.sleep(0)
        calls.append(asyncio.ensure_future(answers(loop, FakeEncoder(), "b")))
        await until(lambda: len(loop._calls) == 2 and loop._calls[1].prompts.is_ready())
        assert not engine.entered
        await loop.command(lambda: setattr(loop, "is_held", False))
        found = await asyncio.gather(*calls)
        assert found[0] == {name: [0, 0] for name in many} and found[1] == {"b": [0]}

    run(test())
    assert engine.entered[0] == ("a0", 7)
    assert MOST <= engine.most <= MOST + 1, "a prompt enters whole"


def test_new_clips_enter_one_a_step_where_a_step_computes_one_and_no_call_overtakes_another(loop, engine):
    """Each prompt has a clip of its own, of 12 tokens."""
    seen: list[int] = []
    engine.num_steps, engine.before_step = 5, lambda: seen.append(len(engine.entered))

    async def test() -> None:
        loop._admission._tokens_a_pass, loop.is_held = 20, True
        first = asyncio.ensure_future(answers(loop, FakeEncoder(), "a", "b"))
        await until(lambda: len(loop._calls) == 1 and len(loop._calls[0].prompts._begun) == 2)
        second = asyncio.ensure_future(answers(loop, FakeEncoder(), "c"))
        await until(
            lambda: len(loop._calls) == 2 and all(f.done() for c in loop._calls for f, _ in c.prompts._begun)
        )
        await loop.command(lambda: setattr(loop, "is_held", False))
        assert await first == {"a": [0], "b": [0]} and await second == {"c": [0]}

    run(test())
    assert [name for name, _ in engine.entered] == ["a", "b", "c"] and seen[:3] == [1, 2, 3]


def test_a_command_waits_until_the_engine_is_empty_and_prompts_wait_for_the_command(loop, engine):
    stepped, go_on = threading.Event(), threading.Event()

    def before_step() -> None:
        stepped.set()
        wait_for(go_on)

    engine.before_step = before_step

    def publish() -> str:
        assert not engine.inside
        engine.version = 1
        return "done"

    async def test() -> None:
        first = asyncio.ensure_future(answers(loop, FakeEncoder(), "a"))
        await asyncio.to_thread(wait_for, stepped)
        command = asyncio.ensure_future(loop.command(publish))
        second = asyncio.ensure_future(answers(loop, FakeEncoder(), "b"))
        await until(lambda: len(loop._calls) == 2 and loop._commands)
        go_on.set()
        assert await command == "done"
        assert await first == {"a": [0]} and await second == {"b": [1]}

    run(test())


@pytest.mark.parametrize("seed", range(5))
def test_no_answer_comes_from_two_versions_whatever_overlaps(loop, engine, seed):
    """The engine checks the version of each prompt at each step."""
    rng = random.Random(seed)

    def publish() -> None:
        engine.version += 1

    async def test() -> None:
        encoder, work = FakeEncoder(), []
        for i in range(30):
            names = [f"{i}-{k}" for k in range(rng.randrange(1, 5))]
            work.append(asyncio.ensure_future(answers(loop, encoder, *names, num_answers=rng.choice([1, 3]))))
            if rng.random() < 0.3:
                work.append(asyncio.ensure_future(loop.command(publish)))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 2e-3)
        found = [f for f in await asyncio.gather(*work) if f]
        assert len(found) == 30 and all(len(set(v)) == 1 for f in found for v in f.values())

    run(test())
    assert not engine.inside and not loop._calls


def test_what_one_prompt_does_wrong_ends_its_call_alone(loop, engine):
    def encode(name: str) -> str | None:
        if name == "broken":
            raise RuntimeError("a bug")
        return "unreadable" if name == "lost" else None

    def refuse(_: Any) -> Request:
        raise LookupError("no weights")

    encoder = FakeEncoder(encode)

    async def refused() -> None:
        async for _ in loop.sample(encoder, [make_prompt("x")], refuse):
            pass

    async def test() -> None:
        found = await asyncio.gather(
            answers(loop, encoder, "a", "lost", "b"),
            answers(loop, encoder, "c", "broken", "d"),
            answers(loop, encoder, "too long"),
            answers(loop, encoder, "lost"),
            answers(loop, encoder),
            refused(),
            return_exceptions=True,
        )
        assert found[0] == {"a": [0], "b": [0], "lost": "unreadable"}
        assert found[3] == {"lost": "unreadable"} and found[4] == {}
        assert [repr(found[i]) for i in (1, 2, 5)] == [
            "RuntimeError('a bug')",
            "ValueError('the prompt is too long')",
            "LookupError('no weights')",
        ]
        await loop.command(lambda: None)

    run(test())
    assert not engine.inside and not loop._calls and encoder.feed._free_bytes == 1000


def test_an_error_of_the_engine_reaches_every_call_every_command_and_all_that_come_later(loop, engine):
    async def test() -> None:
        loop.is_held = True
        work = [asyncio.ensure_future(answers(loop, FakeEncoder(), name)) for name in ("a", "b")]
        await until(lambda: len(loop._calls) == 2)

        def fail() -> None:
            wait_for(asked)
            raise RuntimeError("no memory left")

        engine.before_step, asked = fail, threading.Event()
        with pytest.raises(LookupError):  # of a command, it reaches its caller alone
            await loop.command({}.popitem)
        await loop.command(lambda: setattr(loop, "is_held", False))
        await until(lambda: engine.inside)
        work.append(asyncio.ensure_future(loop.command(lambda: None)))
        await until(lambda: loop._commands)
        asked.set()
        for failed in await asyncio.gather(*work, return_exceptions=True):
            assert repr(failed) == "RuntimeError('no memory left')"
        for late in (answers(loop, FakeEncoder(), "c"), loop.command(lambda: None)):
            with pytest.raises(RuntimeError, match="no memory left"):
                await late

    run(test())
    loop._thread.join(60)
    assert not loop._thread.is_alive()


def test_what_starts_the_engine_may_fail():
    def start() -> Any:
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        EngineLoop(start, MOST)


@pytest.mark.parametrize("cancels", [True, False])
def test_a_caller_that_stops_leaves_nothing_behind(loop, engine, cancels):
    engine.num_steps = 10**9
    encoder = FakeEncoder()
    names = [f"a{i}" for i in range(9)]

    async def stop_early() -> None:
        async with aclosing(loop.sample(encoder, [make_prompt(n) for n in ("lost", *names)], ask)) as results:
            async for _ in results:
                return

    def ask(_: Any) -> Request:
        return Request(0)

    async def test() -> None:
        if cancels:
            call = asyncio.ensure_future(answers(loop, encoder, *names))
            await until(lambda: len(engine.inside) == MOST)
            call.cancel()
        else:
            encoder._encode = lambda name: "unreadable" if name == "lost" else None
            for _ in range(20):  # callers and the engine's thread meet at other moments
                await stop_early()
        await until(lambda: not loop._calls)
        engine.num_steps = 1
        assert await answers(loop, encoder, "b") == {"b": [0]}

    run(test())
    assert not engine.inside and not loop._call_of and loop._num_answers == 0
    assert encoder.feed._free_bytes == 1000 and (not cancels or len(engine.aborted) == MOST)


def test_a_command_that_comes_as_prompts_enter_is_before_the_next_of_them(loop, engine):
    entered: list[str] = []
    add = engine.add

    async def test() -> None:
        events, done = asyncio.get_running_loop(), []

        def add_and_command(rendered, *how):
            if not entered:
                while not loop._calls[0].prompts.is_ready():  # the second prompt
                    time.sleep(0.001)
                command = loop.command(lambda: entered.append("command"))
                done.append(asyncio.run_coroutine_threadsafe(command, events))
                while not loop._commands:
                    time.sleep(0.001)
            entered.append(rendered.prompt_id)
            return add(rendered, *how)

        engine.add = add_and_command
        await answers(loop, FakeEncoder(), "a", "b")
        await asyncio.wrap_future(done[0])

    run(test())
    assert entered == ["a", "command", "b"]
