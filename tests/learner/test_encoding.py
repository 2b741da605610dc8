"""The prompts of an update are read and encoded while the learner computes, each of them once."""

import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner import engine as learner_engine
from learner.batching import plan_update
from learner.encoding import encoded_rows
from learner.engine import LearnerEngine
from tests.fakes import make_clip, make_group
from video_opd.config_file import load_demo
from video_opd.errors import ClipError, ParityError
from video_opd.models.feed import Feed
from video_opd.models.prompting import PromptEncoder
from video_opd.types import ScoredGroup

PATIENCE_S = 30.0
VOCABULARY = 50


class Encoder(PromptEncoder):
    """One whose encodings are names. Clips named in `unreadable` cannot be read."""

    def __init__(self, most_ahead: int = 100, unreadable: tuple[str, ...] = (), sees: str = "fingerprint"):
        self._feed = Feed(2, most_ahead, lambda prompt: 1)
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.pad_ids = 98, 99
        self._unreadable, self._sees, self._changed = unreadable, sees, threading.Condition()
        self.encoded: Counter[str] = Counter()
        self.read: Counter[str] = Counter()  # clips

    def token_ids(self, prompt) -> Any:
        return np.arange(5)

    def encode(self, prompt, blank_video=False, frames=None, digest=None) -> Any:
        with self._changed:
            self.encoded[prompt.prompt_id] += 1
            self._changed.notify_all()
        name = prompt.clip.clip_id
        if name in self._unreadable and frames is None:
            raise ClipError("it is gone")
        self.read[name] += frames is None
        frames = np.zeros(3) if frames is None else frames
        grey = bool((frames == 128).all())
        seen = {"fingerprint": self._sees, "token_ids": np.arange(5), "video_grid_thw": (1, 2, 2)}
        seen |= {"frames": frames, "frames_digest": digest or name}
        return SimpleNamespace(prompt_id=prompt.prompt_id, grey=grey, **seen)

    def wait_for(self, *prompt_ids: str) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: set(prompt_ids) <= self.encoded.keys(), PATIENCE_S)


CONFIG = load_demo(["learner.micro_batch=2", "loss.kind=opd"])
NAMES = [f"p{i}" for i in range(8)]


def planned(groups):
    return plan_update(groups, CONFIG.loss, CONFIG.learner, 0, lambda _: np.arange(5), 99).micro_batches


def of_clip(name: str, group: ScoredGroup) -> ScoredGroup:
    prompt = replace(group.group.prompt, clip=make_clip(name))
    return replace(group, group=replace(group.group, prompt=prompt))


def names(batch) -> list[str]:
    return [prompt.prompt_id for prompt in batch.prompts]


def test_while_a_micro_batch_is_trained_on_the_next_are_encoded_as_far_as_memory_allows():
    encoder = Encoder(most_ahead=4)
    micro_batches = planned([make_group(name) for name in NAMES])
    order = [row.prompt.prompt_id for rows in micro_batches for row in rows]
    batches = encoded_rows(encoder, micro_batches)
    assert names(next(batches)) == order[:2]
    assert encoder.wait_for(*order[:5])  # the second is still held, three of four are ahead of it
    assert names(next(batches)) == order[2:4]
    assert encoder.wait_for(*order[:7]) and order[7] not in encoder.encoded
    assert [names(batch) for batch in batches] == [order[4:6], order[6:]] and sorted(order) == NAMES
    assert set(encoder.encoded.values()) == {1}


def test_a_prompt_is_encoded_once_for_all_its_rows():
    encoder = Encoder()
    micro_batches = planned([make_group(name, lengths=(9, 5, 2)) for name in NAMES])
    batches = list(encoded_rows(encoder, micro_batches))
    wanted = [[row.prompt.prompt_id for row in rows] for rows in micro_batches]
    assert [names(batch) for batch in batches] == wanted and len(batches) == 12
    assert encoder.encoded == Counter(NAMES)


def test_a_clip_is_read_once_for_all_its_prompts_and_held_for_its_last_pass():
    encoder = Encoder()
    groups = [of_clip("a", make_group(name)) for name in NAMES[:5]] + [of_clip("b", make_group("p7"))]
    batches = list(encoded_rows(encoder, planned(groups)))
    assert encoder.read == Counter("ab") and encoder.encoded == Counter([*NAMES[:5], "p7"])
    of_clips = [{prompt.frames_digest for prompt in batch.prompts} for batch in batches]
    later = [set().union(*of_clips[i + 1 :]) for i in range(len(batches))]
    assert [batch.kept for batch in batches] == [a & b for a, b in zip(of_clips, later, strict=True)]
    assert batches[0].kept and not batches[-1].kept


def test_an_unreadable_clip_fails_each_of_its_prompts_by_name():
    encoder = Encoder(unreadable=("a",))
    groups = [of_clip("a", make_group(name)) for name in NAMES[:3]]
    batches = list(encoded_rows(encoder, planned(groups)))
    assert sorted(f.prompt_id for batch in batches for f in batch.failed) == NAMES[:3]


def test_an_unreadable_clip_gives_all_its_rows_weight_0_and_grey_frames():
    encoder = Encoder(unreadable=("p1",))
    batches = list(encoded_rows(encoder, planned([make_group(n, lengths=(4, 3)) for n in NAMES[:2]])))
    prompts: list[Any] = [prompt for batch in batches for prompt in batch.prompts]
    weights = [row.weight for batch in batches for row in batch.rows]
    rows = [(p.prompt_id, weight, p.grey) for p, weight in zip(prompts, weights, strict=True)]
    assert sorted(set(rows)) == [("p0", 1.0, False), ("p1", 0.0, True)] and len(rows) == 4
    assert [f.prompt_id for batch in batches for f in batch.failed] == ["p1", "p1"]


def test_a_prompt_that_the_actor_saw_otherwise_stops_the_update():
    with pytest.raises(ParityError, match="p0: the learner sees other"):
        next(encoded_rows(Encoder(sees="other"), planned([make_group("p0")])))


class DeepSpeed:
    """In place of DeepSpeed's engine. Each pass begins when every prompt of the update has been encoded."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self.module = SimpleNamespace(model=SimpleNamespace(train=lambda: None))
        self.optimizer = SimpleNamespace(param_groups=[{}])
        self.set_gradient_accumulation_boundary = self.backward = lambda _: None
        self.step = lambda: None
        self.get_global_grad_norm = lambda: 1.0
        self.passes = 0

    def __call__(self, batch, loss, most_tokens):
        assert self._encoder.wait_for(*NAMES), "the next micro-batches wait for this one"
        self.passes += 1
        return loss(torch.zeros(len(batch.targets), VOCABULARY), slice(None))


def test_no_micro_batch_of_an_update_waits_for_an_encode_that_could_have_been_made_before(monkeypatch):
    encoder, rank = Encoder(), object.__new__(LearnerEngine)
    deepspeed = DeepSpeed(encoder)
    rank.__dict__.update(
        {"_config": CONFIG, "_rank": 0, "_world_size": 1, "_device": "cpu", "_encoder": encoder}
        | {"_engine": deepspeed, "_teacher_heads": {}, "_vision": None, "_policy": torch.clone}
        | {"_is_time": lambda ids: np.zeros(len(ids), bool)}
    )

    def collate(prompts, responses, *_, **__):
        return SimpleNamespace(trees=(), targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)))

    monkeypatch.setattr(learner_engine, "collate", collate)
    metrics, failed = rank.update([make_group(name) for name in NAMES], step=0)
    assert deepspeed.passes == 4 and not failed
    assert metrics["learner/entropy"] == pytest.approx(np.log(VOCABULARY))
    assert metrics["learner/num_tokens"] == 24
