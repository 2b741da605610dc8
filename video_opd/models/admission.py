"""Which prompts enter a vLLM engine before its next pass, so that it computes what they share once.

From the moment in which vLLM plans the first of some prompts, the others take from its prefix cache what they
begin with, in the same pass too. It looks there only while it has computed nothing of a prompt
(Scheduler.schedule in vllm/v1/core/sched/scheduler.py). But prompts whose video does not fit into the rest of
a pass, it begins up to the video (_try_schedule_encoder_inputs), and each of them then computes the video's
tokens for itself. So a clip enters when a pass computes all of it; its other prompts follow it.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from video_opd.types import EncodedPrompt


class Beginning(NamedTuple):
    """What the prompts of a clip share."""

    frames_digest: str
    token_ids: bytes  # up to the end of the video
    num_tokens: int
    num_others: int  # tokens of the prompt after them


def beginning_of(prompt: EncodedPrompt) -> Beginning:
    end = int(np.flatnonzero(prompt.token_types)[-1]) + 1
    return Beginning(prompt.frames_digest, prompt.token_ids[:end].tobytes(), end, len(prompt.token_ids) - end)


class Admission:
    """Counts what enters an engine and leaves it. For the engine's thread."""

    def __init__(self, tokens_a_pass: int):
        self._tokens_a_pass = tokens_a_pass
        self._inside: Counter[tuple[str, bytes]] = Counter()  # prompts in the engine, by what they begin with
        self._room = self._ahead = 0
        self._seen: set[tuple[str, bytes]] = set()  # in this pass: their video may be looked at again

    def begin_pass(self, num_waiting_tokens: int, num_running: int) -> None:
        """num_waiting_tokens: of prompts that the engine has not computed. num_running: answers under way."""
        self._room, self._ahead = self._tokens_a_pass - num_running, num_waiting_tokens
        self._seen.clear()

    def fits(self, of: Beginning) -> bool:
        """Whether the prompt may enter before the next pass. A prompt larger than a pass begins one."""
        if not self._ahead or self._inside[of[:2]]:
            return True
        return self._ahead + of.num_tokens + of.num_others <= self._room

    def enter(self, of: Beginning, num_answers: int) -> None:
        self._inside[of[:2]] += 1
        self._ahead += num_answers * of.num_others + (0 if of[:2] in self._seen else of.num_tokens)
        self._seen.add(of[:2])

    def leave(self, of: Beginning) -> None:
        self._inside[of[:2]] -= 1
        if not self._inside[of[:2]]:
            del self._inside[of[:2]]
