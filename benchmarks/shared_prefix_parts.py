"""A teacher and a learner on sequences that share clips, in three ways: for benchmarks.shared_prefix."""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.clips import write_demo_clips
from benchmarks.emulated_teacher import make_trajectory
from demo.models import STUDENT, TEACHER, build_model, build_processor
from learner.engine import LearnerEngine
from teacher_service.engine import TransformersEngine
from teacher_service.replica import TeacherReplica
from video_opd.config import Config
from video_opd.config_data import PromptConfig
from video_opd.config_file import load_demo
from video_opd.datasets import read_sources
from video_opd.models.forward import ResponseBatch, ResponseLogits
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, Prompt, ScoredGroup, TeacherScores, Trajectory, TrajectoryGroup

Way = Literal["trees", "alone", "padded"]
FRAMES = 16  # of a clip: eight grids of video tokens
SEQUENCES, PADDED = 8, 4  # of a step; of a pass of padded sequences
RESPONSE_TOKENS = 20, 60  # at least, at most
NOISE = 0.05  # on random weights, so that distributions are sharp
LR = 1e-12  # weights stay as they are


@dataclass(frozen=True)
class Case:
    """A step of SEQUENCES sequences."""

    queries: int  # of a clip
    rollouts: int  # of a query
    video_tokens: int
    device: str = "cpu"

    @property
    def clips(self) -> int:
        return SEQUENCES // (self.queries * self.rollouts)

    def per_pass(self, way: Way) -> int:
        """Sequences of a pass. Those of trees have no more tokens than PADDED sequences apart."""
        shared = SEQUENCES if self.queries * self.rollouts > 1 else PADDED
        return {"trees": shared, "alone": 1, "padded": PADDED}[way]


def write_inputs(case: Case, folder: Path) -> list[str]:
    """Models with random weights, whose tokenizer has each word of the prompt as one token, and clips."""
    processor: Any = build_processor()
    words = re.findall(r" ?[A-Za-z]+", PromptConfig().template)
    processor.tokenizer.add_tokens(sorted(set(words) - {"query"}))
    processor.video_processor.size["longest_edge"] = 2 * FRAMES * 512**2
    for seed, (name, size) in enumerate({"student": STUDENT, "teacher": TEACHER}.items()):
        model: Any = build_model(size, processor.tokenizer, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * NOISE)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    scale = round((case.video_tokens / (FRAMES // 2)) ** 0.5)
    clips = write_demo_clips(folder / "clips", case.clips, case.queries, scale)
    return [f"{name}={folder / name}" for name in ("student", "teacher")] + clips


def make_config(case: Case, inputs: Sequence[str], cache: Path) -> Config:
    """The demo's, with the default prompt, in float32. cache: of frames."""
    overrides = [*inputs, "prompt={style: timelens}", f"video.cache_dir={cache}"]
    overrides += ["loss={kind: grpo}" if case.rollouts > 1 else "loss={kind: opd}"]
    overrides += [f"rollout.rollouts_per_prompt={case.rollouts}", f"video.max_frames={FRAMES}"]
    overrides += [f"video.max_video_tokens={case.video_tokens}", f"learner.lr={LR}"]
    on_gpu = int(case.device == "cuda")
    overrides += ["learner.gradient_checkpointing=true", f"learner.num_gpus={on_gpu}"]
    return load_demo([*overrides, f"teacher_pool.num_gpus={on_gpu}"])


class Step:
    """The sequences of one step, those of a clip next to each other."""

    def __init__(self, case: Case, config: Config, encoder: PromptEncoder, seed: int):
        rng, prompts = np.random.default_rng(seed), read_sources(config.data, config.video, 32).prompts
        encoded = [encoder.encode(prompt) for prompt in prompts]
        self.prompts = [prompt for prompt in encoded for _ in range(case.rollouts)]  # of each sequence
        self.groups = [self._group(case, *pair, rng) for pair in zip(prompts, encoded, strict=True)]
        self.responses = [t.response_token_ids for g in self.groups for t in g.group.trajectories]

    def _group(self, case: Case, prompt: Prompt, encoded: EncodedPrompt, rng: Any) -> ScoredGroup:
        def trajectory(number: int) -> Trajectory:
            length = int(rng.integers(*RESPONSE_TOKENS, endpoint=True))
            response = rng.integers(5, 300, length).astype(np.int32)
            made = make_trajectory(prompt.prompt_id, 0, number, (encoded.token_ids, response))
            logprobs = rng.normal(-6, 1, length).astype(np.float32)
            return replace(made, prompt_fingerprint=encoded.fingerprint, actor_logprobs=logprobs)

        def scores(of: Trajectory) -> TeacherScores:
            logprobs = rng.normal(-6, 1, len(of.response_token_ids)).astype(np.float32)
            return TeacherScores(
                trajectory_id=of.trajectory_id, teacher_id="teacher", teacher_logprobs=logprobs, top_k=None
            )

        trajectories = tuple(trajectory(i) for i in range(case.rollouts))
        group = TrajectoryGroup(prompt=prompt, trajectories=trajectories)
        if case.rollouts > 1:
            return ScoredGroup(group=group, scores=(), rewards=tuple(rng.uniform(size=case.rollouts)))
        return ScoredGroup(group=group, scores=tuple(map(scores, trajectories)))


class Teacher:
    """Phase `score`: a replica encodes the prompts of a call and scores its responses."""

    def __init__(self, config: Config):
        self._replica = TeacherReplica(config, config.teacher_models[0])
        self.encoder, engine = self._replica._encoder, self._replica._engine
        assert isinstance(engine, TransformersEngine)
        self._engine, self.model = engine, engine._model

    def run(self, step: Step, sequences: int) -> np.ndarray:
        """float32[response tokens]: their log-probs."""
        pool = self._replica._pool.model_copy(update={"micro_batch": sequences})
        self._replica._pool = self._engine.config = pool
        reply = asyncio.run(self._replica.score([scored.group for scored in step.groups]))
        return np.concatenate([scores.teacher_logprobs for of_group in reply.results for scores in of_group])

    result = run


class Learner:
    """Phase `update`: a whole update of the learner's engine, DeepSpeed's step included."""

    def __init__(self, config: Config):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        self._engine = LearnerEngine(config, 0, 1, address)
        self.encoder, self.model = self._engine._encoder, self._engine._model

    def run(self, step: Step, sequences: int) -> None:
        engine, learner = self._engine, self._engine._config.learner
        of_pass = learner.model_copy(update={"micro_batch": sequences})
        engine._config = engine._config.model_copy(update={"learner": of_pass})
        metrics, failed = engine.update(step.groups, 0)
        assert not failed and not metrics["learner/skipped"]

    def result(self, step: Step, sequences: int) -> dict[str, np.ndarray]:
        """The gradient of each parameter."""
        sums = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        hooks = [p.register_hook(sums[name].add_) for name, p in self.model.named_parameters()]
        self.run(step, sequences)
        for hook in hooks:
            hook.remove()
        return {name: gradient.cpu().numpy() for name, gradient in sums.items()}


def padded_hidden(self: ResponseLogits, batch: ResponseBatch) -> torch.Tensor:
    """ResponseLogits.hidden by transformers' own forward: right-padded, with the pixels of each sequence."""
    separate, device = batch.separate, batch.input_ids.device
    lengths, width = separate.attention_mask.sum(1).tolist(), separate.input_ids.shape[1]
    of_clips = batch.pixel_values.split(batch.video_grid_thw.prod(1).tolist())
    clip = {i: pixels for pixels, tree in zip(of_clips, batch.trees, strict=True) for i in tree.members}
    hidden = self.model.model(
        input_ids=separate.input_ids.to(device),
        attention_mask=separate.attention_mask.to(device),
        mm_token_type_ids=separate.mm_token_type_ids.to(device),
        pixel_values_videos=torch.cat([clip[i] for i in range(len(lengths))]).to(self.model.dtype),
        video_grid_thw=separate.video_grid_thw.to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    ends = [i * width + length - 1 for i, length in enumerate(lengths)]
    rows = [torch.arange(end - n, end) for end, n in zip(ends, batch.lengths, strict=True)]
    return hidden[torch.cat(rows).to(device)]


@contextmanager
def computing(way: Way) -> Iterator[None]:
    """The passes inside are of padded sequences, if that is the way."""
    if way == "padded":
        with patch.object(ResponseLogits, "hidden", padded_hidden):
            yield
    else:
        yield


def counted(model: Any, work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns; through how many clips the vision tower went."""
    grids = []

    def note(_: Any, given: tuple, named: dict[str, Any]) -> None:
        grids.append(named["grid_thw"] if "grid_thw" in named else given[1])

    hook = model.model.visual.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return work(), sum(len(grid) for grid in grids)
    finally:
        hook.remove()
