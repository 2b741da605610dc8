"""A thread that owns an engine. Prompts of several calls enter it between two steps, encoded before."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from video_opd.models.admission import Admission, Beginning, beginning_of
from video_opd.models.feed import Ahead
from video_opd.models.prompting import PromptEncoder
from video_opd.models.vllm_engine import Added, Completion, Rendered, SamplingEngine
from video_opd.types import CacheHits, EncodedPrompt, FailedPrompt, Prediction, Prompt

Engine = TypeVar("Engine", bound=SamplingEngine)
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What is asked of a prompt; see SamplingEngine.add."""

    seed: int | None
    num_answers: int = 1
    policy_version: int = -1  # of the weights that answer
    temperature: float | None = None


class Answered(NamedTuple):
    prompt: EncodedPrompt
    request: Request
    completions: list[Completion]
    cache_hits: CacheHits


Admit = Callable[[EncodedPrompt], Request]
"""Decides when a prompt enters the engine, in the engine's thread. What it raises ends the call."""


GREEDY = Request(None)


class _Ready(NamedTuple):
    prompt: EncodedPrompt
    rendered: Rendered
    beginning: Beginning


class _Entered(NamedTuple):
    added: Added
    prompt: EncodedPrompt
    request: Request
    was_processed: bool  # see Rendered
    beginning: Beginning


@dataclass(eq=False)
class _Call:
    """The prompts of one caller that are not answered yet."""

    prompts: Ahead[Prompt, _Ready | FailedPrompt]  # that have not entered
    admit: Admit
    deliver: Callable[[Any], None]  # FailedPrompt; what entered and vLLM's output; an error; None: end
    entered: dict[str, _Entered] = field(default_factory=dict)


class _Command(NamedTuple):
    work: Callable[[], Any]
    is_drained: bool  # whether the engine must be empty
    done: Future


class EngineLoop(Generic[Engine]):
    """Steps an engine while any prompt is in it.

    Prompts enter when they are ready, those of the oldest call first, while fewer than max_num_seqs answers
    are under way; of new clips as many as the next step computes, see admission.py. Commands run between two
    steps, in order; while one waits, no prompt enters. An error of a step reaches all calls and commands, and
    all that come later.
    """

    def __init__(self, start: Callable[[], Engine], max_num_seqs: int):
        """Returns when the engine has started, in its thread. Raises what `start` raises."""
        self.is_held = False  # set by commands: no prompt enters
        self._max_num_seqs = max_num_seqs
        self._changed = threading.Condition()  # guards the next five
        self._calls: list[_Call] = []  # oldest first
        self._left: deque[_Call] = deque()  # whose callers listen no longer
        self._commands: deque[_Command] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        self._call_of: dict[str, _Call] = {}  # by the name of a prompt in the engine
        self._num_answers = 0  # under way
        started: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(start, started), name="engine", daemon=True)
        self._thread.start()
        self.engine = started.result()

    async def sample(
        self, encoder: PromptEncoder, prompts: Sequence[Prompt], admit: Admit, blank_video: bool = False
    ) -> AsyncGenerator[Answered | FailedPrompt]:
        """What becomes of each prompt, as it is known. The rest is dropped when the caller stops early."""
        results: asyncio.Queue[Any] = asyncio.Queue()
        events = asyncio.get_running_loop()

        def deliver(result: Any) -> None:
            with suppress(RuntimeError):  # the caller has ended with its event loop
                events.call_soon_threadsafe(results.put_nowait, result)

        def render(encoded: EncodedPrompt) -> _Ready:
            return _Ready(encoded, self.engine.render(encoded), beginning_of(encoded))

        call = _Call(encoder.prepare_ahead(prompts, render, blank_video, self._wake), admit, deliver)
        self._add(self._calls, call)
        try:
            while (result := await results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                if not isinstance(result, FailedPrompt):
                    result = self._answered(*result)
                yield result
        finally:
            self._add(self._left, call)

    def _answered(self, entered: _Entered, output: Any) -> Answered:
        num_cached = self.engine.num_cached_tokens(entered.added)
        hits = CacheHits(num_cached_tokens=num_cached, was_clip_processed=entered.was_processed)
        completions = self.engine.completions(entered.prompt, output)
        return Answered(entered.prompt, entered.request, completions, hits)

    async def command(self, work: Callable[[], T], drained: bool = True) -> T:
        """work() in the engine's thread, `drained`: once the prompts in the engine are answered."""
        done: Future[T] = Future()
        self._add(self._commands, _Command(work, drained, done))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _add(self, where: Any, what: Any) -> None:
        with self._changed:
            if self._error and where is not self._left:
                raise self._error
            where.append(what)
            self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self, start: Callable[[], Engine], started: Future[Engine]) -> None:
        try:
            engine = start()
        except BaseException as error:
            started.set_exception(error)
            return
        self._admission = Admission(engine.tokens_a_pass)
        started.set_result(engine)
        try:
            while not self._is_closed:
                self._turn(engine)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
        for call in self._calls:
            call.prompts.close()
            call.deliver(error)
        for command in self._commands:
            if command.done.set_running_or_notify_cancel():
                command.done.set_exception(error)

    def _turn(self, engine: Engine) -> None:
        """Waits for work; then does what is to do between two steps, and one step."""
        with self._changed:
            self._changed.wait_for(self._has_work)
        while self._left:
            self._drop(engine, self._left.popleft())
        if self._is_command_due():
            self._execute(engine, self._commands.popleft())
        elif not self._commands and not self.is_held and any(c.prompts.is_ready() for c in self._calls):
            self._admission.begin_pass(*engine.waiting())
            for call in self._calls.copy():
                if not self._admit(engine, call):
                    break
        if self._call_of:
            for output in engine.step():
                self._deliver(engine, output)

    def _has_work(self) -> bool:
        if self._is_closed or self._left or self._call_of or self._commands:
            return True
        return not self.is_held and any(call.prompts.is_ready() for call in self._calls)

    def _is_command_due(self) -> bool:
        return bool(self._commands) and not (self._commands[0].is_drained and self._call_of)

    def _execute(self, engine: Engine, command: _Command) -> None:
        if not command.done.set_running_or_notify_cancel():
            return
        try:
            if command.is_drained:
                engine.settle()
            command.done.set_result(command.work())
        except Exception as error:
            command.done.set_exception(error)

    def _admit(self, engine: Engine, call: _Call) -> bool:
        """Lets the call's prompts that are ready enter the engine. False: the next is for a later step."""
        try:
            while self._num_answers < self._max_num_seqs and call.prompts.is_ready() and not self._commands:
                ready = call.prompts.peek()
                if isinstance(ready, _Ready) and not self._admission.fits(ready.beginning):
                    return False
                next(call.prompts, None)
                if ready is None:
                    self._end_if_answered(engine, call)
                    break
                if isinstance(ready, FailedPrompt):
                    call.deliver(ready)
                else:
                    self._enter(engine, call, ready)
        except Exception as error:
            call.deliver(error)
            self._drop(engine, call)
        return True

    def _enter(self, engine: Engine, call: _Call, ready: _Ready) -> None:
        request = call.admit(ready.prompt)
        added = engine.add(ready.rendered, request.seed, request.num_answers, request.temperature)
        was_processed = ready.rendered.was_processed
        call.entered[added.name] = _Entered(added, ready.prompt, request, was_processed, ready.beginning)
        self._call_of[added.name] = call
        self._num_answers += request.num_answers
        self._admission.enter(ready.beginning, request.num_answers)

    def _leave(self, name: str, entered: _Entered) -> None:
        del self._call_of[name]
        self._num_answers -= entered.request.num_answers
        self._admission.leave(entered.beginning)

    def _deliver(self, engine: Engine, output: Any) -> None:
        """Hands an answered prompt to its caller."""
        call = self._call_of[output.request_id]
        entered = call.entered.pop(output.request_id)
        self._leave(output.request_id, entered)
        call.deliver((entered, output))
        self._end_if_answered(engine, call)

    def _end_if_answered(self, engine: Engine, call: _Call) -> None:
        if not call.entered and call.prompts.is_over():
            self._drop(engine, call)
            call.deliver(None)

    def _drop(self, engine: Engine, call: _Call) -> None:
        """Leaves nothing of the call behind."""
        with self._changed:
            if call in self._calls:
                self._calls.remove(call)
        call.prompts.close()
        engine.abort([entered.added for entered in call.entered.values()])
        for name, entered in call.entered.items():
            self._leave(name, entered)
        call.entered.clear()


async def predict(
    loop: EngineLoop,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    blank_video: bool = False,
    admit: Admit = lambda _: GREEDY,
    on_answer: Callable[[], None] = lambda: None,
) -> list[list[Prediction] | FailedPrompt]:
    """The answers to each prompt, in order, or a FailedPrompt; greedy unless `admit` asks for others.

    blank_video: with grey frames.
    """
    answers: dict[str, list[Prediction] | FailedPrompt] = {}
    async with aclosing(loop.sample(encoder, prompts, admit, blank_video)) as results:
        async for result in results:
            on_answer()
            if isinstance(result, FailedPrompt):
                answers[result.prompt_id] = result
            else:
                name, style = result.prompt.prompt_id, result.prompt.style
                texts = [encoder.written(c.text) for c in result.completions]
                read = ((text, encoder.spans_in(text, style)) for text in texts)
                answers[name] = [Prediction(prompt_id=name, text=t, spans_s=spans) for t, spans in read]
    return [answers[p.prompt_id] for p in prompts]
