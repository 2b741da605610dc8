"""An engine and an encoder without a model, for tests of what drives them."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from video_opd.answers import parse_spans
from video_opd.models.feed import Ahead, Feed
from video_opd.models.vllm_engine import Added
from video_opd.types import FailedPrompt, Prompt

TIMEOUT_S = 60
MOST = 4  # answers of an engine at once


def wait_for(event: threading.Event) -> None:
    assert event.wait(TIMEOUT_S)


class FakeEngine:
    """Answers each prompt after `num_steps` steps, with the weights of `version`, which may not change."""

    def __init__(self, num_steps: int = 2):
        self.num_steps, self.version = num_steps, 0
        self.inside: dict[str, Any] = {}
        self.entered: list[tuple[str, int | None]] = []  # prompt id and seed
        self.aborted: list[str] = []
        self.most = 0  # answers under way at once
        self.before_step: Callable[[], None] = lambda: None
        self.thread: threading.Thread | None = None

    tokens_a_pass = 1000

    def waiting(self) -> tuple[int, int]:
        return 0, len(self.inside)

    def render(self, encoded: Any) -> Any:
        return encoded

    def num_cached_tokens(self, added: Added) -> int:
        return 0

    def add(
        self, rendered: Any, seed: int | None, num_answers: int = 1, temperature: float | None = None
    ) -> Added:
        if rendered.prompt_id == "too long":
            raise ValueError("the prompt is too long")
        self.entered.append((rendered.prompt_id, seed))
        name = f"{len(self.entered)}-{rendered.prompt_id}"
        self.inside[name] = SimpleNamespace(left=self.num_steps, n=num_answers, version=self.version)
        return Added(name, f"internal {name}")

    def step(self) -> list[Any]:
        assert self.inside, "a step of an empty engine"
        self.thread = threading.current_thread()
        self.most = max(self.most, sum(request.n for request in self.inside.values()))
        self.before_step()
        for request in self.inside.values():
            assert request.version == self.version, "sampled from two versions"
            request.left -= 1
        done = [name for name, request in self.inside.items() if not request.left]
        return [SimpleNamespace(request_id=name, request=self.inside.pop(name)) for name in done]

    def settle(self) -> None:
        assert not self.inside

    def abort(self, added: Sequence[Added]) -> None:
        for one in added:
            self.aborted.append(one.name)
            del self.inside[one.name]

    def completions(self, prompt: Any, output: Any) -> list[int]:
        """The version that answered, for each answer."""
        return [output.request.version] * output.request.n


def encoded(prompt: Prompt) -> Any:
    """Ten tokens of the clip, and two others."""
    ids, types = np.arange(12, dtype=np.int32), np.arange(12) < 10
    seen = {"token_ids": ids, "token_types": types, "frames_digest": prompt.clip.clip_id}
    return SimpleNamespace(prompt_id=prompt.prompt_id, style=prompt.style, was_processed=False, **seen)


class FakeEncoder:
    """`encode` of a prompt id, in the threads of a feed, returns None or why the prompt failed."""

    def __init__(self, encode: Callable[[str], str | None] = lambda _: None, num_threads: int = 2):
        self._encode = encode
        self.feed = Feed[Prompt](num_threads, 1000, lambda _: 100)
        self.pad_ids = (0, 1)

    def prepare_ahead(
        self, prompts: Sequence[Prompt], prepare: Callable, blank_video: bool, on_ready: Callable[[], None]
    ) -> Ahead:
        def encode(prompt: Prompt) -> Any:
            if reason := self._encode(prompt.prompt_id):
                return FailedPrompt(prompt_id=prompt.prompt_id, reason=reason)
            return prepare(encoded(prompt))

        return self.feed.ahead(encode, prompts, on_ready)

    def written(self, response: str) -> str:
        return response

    def spans_in(self, text: str, style: str | None) -> tuple:
        return parse_spans(text)
