"""Whole models of random weights in the engines of teacher and learner: for benchmarks.gpu_step."""

import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.command import Row
from benchmarks.emulated_teacher import make_trajectory
from benchmarks.gpu_check.measure import Setting, device_bytes, release
from benchmarks.gpu_check.models import REAL, TINY, draw_model, make_config, write_clips, write_model_files
from benchmarks.gpu_check.part import Bench
from benchmarks.shared_prefix_parts import padded_hidden
from learner import loading
from learner.engine import LearnerEngine
from preflight.devices import DEVICES, Utilisation, device_name
from preflight.inputs import make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan
from preflight.time_fit import time_plan
from preflight.time_plan import TimePlan
from teacher_service.engine import TransformersEngine, Wanted
from video_opd.config import Config
from video_opd.models import forward
from video_opd.models.patches import patches as patches_of
from video_opd.models.qwen_vl import adapt
from video_opd.types import ScoredGroup, TeacherScores, TrajectoryGroup

CLIPS, RESPONSE = 4, 64  # clips of a step, one prompt each; tokens of a response
WAYS = {"alone": 1, "tree": 8}  # responses to a prompt, all in one pass
TREE_TOKENS = 14000
WIDTH = 8192  # of the matrices that say what the GPU reaches


def prepare(bench: Bench) -> Any:
    """Clips and a model folder without weights; returns transformers' config."""
    folder, size = Path(bench.folder), TINY if bench.tiny else replace(REAL, num_clips=CLIPS)
    if not (folder / "clips").exists():
        write_clips(folder / "clips", size)
    config = write_model_files(bench, folder / bench.model, whole=not bench.tiny)
    nothing = {"drawn.on.the.device": torch.zeros(1, dtype=getattr(torch, bench.dtype))}
    save_file(nothing, folder / bench.model / "model.safetensors")
    return config


@contextmanager
def drawn_weights(bench: Bench) -> Iterator[None]:
    """Models that are loaded inside have random weights, on the bench's device."""
    config = prepare(bench)

    def load(path: str, dtype: str, trust: bool = False, attention: str = "sdpa") -> Any:
        model = draw_model(bench, config, attn_implementation=attention)
        adapt(model, attention)
        return model

    with patch.object(loading, "load_model", load), patch.object(forward, "load_model", load):
        yield


class Whole:
    """One role. Prompts of different clips."""

    role, phase = "", ""

    def __init__(self, bench: Bench, how: Sequence[str]):
        self.bench, self.how = bench, how
        with drawn_weights(bench):
            self.setting = Setting(bench, *self._options("tree"))
            release()
            self.engine: Any = self.make_engine(self.setting.config)
        self.prompts, self.encoded = self.setting.prompts[::2], self.setting.encoded[::2]

    def _options(self, way: str) -> list[str]:
        number, response = WAYS[way], 4 if self.bench.tiny else RESPONSE
        rows = CLIPS if not self.bench.tiny else 1
        of_learner = {"micro_batch": number, "tree_tokens": TREE_TOKENS, "zero_stage": 2}
        options = [f"learner.{key}={value}" for key, value in of_learner.items()]
        options += [f"teacher_pool.micro_batch={number}", "teacher_pool.engine=transformers"]
        options += [f"rollout.rollouts_per_prompt={number}", f"rollout.max_response_tokens={response}"]
        return [*options, f"groups_per_step={rows}", "learner.lr=1e-6", *self.how]

    def config(self, way: str) -> Config:
        return make_config(self.bench, *self._options(way))

    def make_engine(self, config: Config) -> Any:
        raise NotImplementedError

    def step(self, config: Config, responses: Sequence[np.ndarray]) -> Any:
        raise NotImplementedError

    def measure(self, way: str, repeats: int, profiles: bool) -> Row:
        config, rng = self.config(way), np.random.default_rng(0)
        length = config.rollout.max_response_tokens
        responses = [
            rng.integers(0, 500, length).astype(np.int32) for _ in range(len(self.prompts) * WAYS[way])
        ]
        work = partial(self.step, config, responses)
        release()
        seconds = [clocked(work) for _ in range(repeats + 1)]
        row = self._memory(config) | self._time(config, seconds)
        if profiles:
            profile(work, f"{self.bench.model} {self.phase} {way}")
        return row | self.compare(config, responses)

    def compare(self, config: Config, responses: Sequence[np.ndarray]) -> Row:
        return {}

    def _memory(self, config: Config) -> Row:
        draft = make_draft(config)
        (role,) = (r for r in memory_plan(config, draft, None).roles if r.role == self.role)
        if self.bench.device == "cpu" or role.device is None:
            return {}
        taken, _ = device_bytes()
        row = {"peak_GiB": taken / GIB, "planned_GiB": role.device.peak_bytes / GIB}
        row |= {"tensors_GiB": torch.cuda.max_memory_allocated() / GIB}
        row |= {"kept_GiB": torch.cuda.max_memory_reserved() / GIB, "phase": role.device.largest_phase}
        return row

    def _time(self, config: Config, seconds: Sequence[float]) -> Row:
        first, *others = seconds
        row: Row = {"first_s": first, "seconds": statistics.median(others)}
        row |= {"lowest": min(others), "highest": max(others)}
        name = device_name(torch.cuda.get_device_name()) if self.bench.device == "cuda" else None
        if name is None:
            return row
        draft, use = make_draft(config), Utilisation()
        plan = time_plan(memory_plan(config, draft, None), draft, name, use)
        assert isinstance(plan, TimePlan), plan
        phase = plan.phases[self.phase]
        compute = phase.num_units * next(iter(phase.terms.values()))
        planned = phase.num_units * sum(phase.terms.values()) + sum(phase.once.values())
        share = {"score": use.prefill, "update": use.training}[self.phase]
        in_step = row["seconds"] - sum(phase.once.values())
        tera = compute * share * DEVICES[name].bfloat16 / 1e12
        row |= {"planned_s": planned, "TFLOP": tera, "TFLOP/s": tera / in_step}
        return row | {"reached": share * compute / in_step}


class Score(Whole):
    """A pass for each prompt's responses."""

    role, phase = "teacher", "score"

    def make_engine(self, config: Config) -> TransformersEngine:
        how = Wanted(), 0, self.setting.encoder, False, config.rollout.temperature
        return TransformersEngine(config.student, config.teacher_pool, *how)

    def step(self, config: Config, responses: Sequence[np.ndarray]) -> list[np.ndarray]:
        number, found = config.teacher_pool.micro_batch, []
        for i, prompt in enumerate(self.encoded):
            own = responses[i * number : (i + 1) * number]
            found += [scores.logprobs for scores in self.engine.score([prompt] * number, own)]
        return found

    def compare(self, config: Config, responses: Sequence[np.ndarray]) -> Row:
        """With transformers' own forward, over the first prompt's sequences one by one."""
        number = config.teacher_pool.micro_batch
        prompt, own = self.encoded[0], responses[:number]
        packed = self.engine.score([prompt] * number, own)
        with patch.object(forward.ResponseLogits, "hidden", padded_hidden):
            seconds = [clocked(lambda: self.engine.score([prompt], own[:1])) for _ in range(2)]
            plain = [self.engine.score([prompt], [response])[0] for response in own]
        differences = np.abs(
            np.concatenate([a.logprobs - b.logprobs for a, b in zip(packed, plain, strict=True)])
        )
        return {
            "gap_mean": float(differences.mean()),
            "gap_max": float(differences.max()),
            "plain_pass_s": seconds[-1],
        }


class Update(Whole):
    """A whole update, Adam's step included."""

    role, phase = "learner", "update"

    def make_engine(self, config: Config) -> LearnerEngine:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        return LearnerEngine(config, 0, 1, address)

    def step(self, config: Config, responses: Sequence[np.ndarray]) -> None:
        self.engine._config = config
        self.engine._engine.module._chunk = config.learner.logit_rows
        metrics, failed = self.engine.update(self._groups(config, responses), 0)
        assert not failed and not metrics["learner/skipped"] and np.isfinite(metrics["learner/grad_norm"])

    def _groups(self, config: Config, responses: Sequence[np.ndarray]) -> list[ScoredGroup]:
        number, groups, rng = config.rollout.rollouts_per_prompt, [], np.random.default_rng(1)
        for i, (prompt, encoded) in enumerate(zip(self.prompts, self.encoded, strict=True)):
            trajectories, scores = [], []
            for j, response in enumerate(responses[i * number : (i + 1) * number]):
                made = make_trajectory(prompt.prompt_id, 0, j, (encoded.token_ids, response))
                actor, teacher = rng.normal(-12, 1, (2, len(response))).astype(np.float32)
                known = {"prompt_fingerprint": encoded.fingerprint, "actor_logprobs": actor}
                trajectories.append(replace(made, **known))
                found = {"teacher_id": "teacher", "teacher_logprobs": teacher, "top_k": None}
                scores.append(TeacherScores(trajectory_id=made.trajectory_id, **found))
            group = TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories))
            groups.append(ScoredGroup(group=group, scores=tuple(scores)))
        return groups


PHASES: dict[str, Callable[..., Whole]] = {"score": Score, "update": Update}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clocked(work: Callable[[], Any]) -> float:
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def profile(work: Callable[[], Any], title: str) -> None:
    """The kernels that take most time of one call, to stderr."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        wait()
    kernels = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels)
    print(f"--- {title}: {total / 1e6:.3f} s on the GPU", file=sys.stderr)
    for kernel in kernels[:16]:
        took = kernel.self_device_time_total
        print(
            f"{took / total:6.1%} {took / 1e3:9.1f} ms {kernel.count:6d} x {kernel.key[:110]}",
            file=sys.stderr,
        )


def matmul(bench: Bench, repeats: int) -> list[Row]:
    """What a product of large matrices reaches."""
    width = 256 if bench.tiny else WIDTH
    a, b = (torch.randn(width, width, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [clocked(lambda: [a @ b for _ in range(20)]) / 20 for _ in range(repeats + 1)][1:]
    return [{"case": "matmul", "TFLOP/s": 2 * width**3 / statistics.median(seconds) / 1e12}]


def patches(bench: Bench, _: int) -> list[Row]:
    """Patches made on the device against those made on the CPU."""
    prepare(bench)
    setting = Setting(bench)
    prompt = setting.encoded[0]
    frames = torch.from_numpy(prompt.frames.copy())
    here = patches_of(frames, prompt.patching)
    there = patches_of(frames.to(bench.device), prompt.patching).cpu()
    apart = (here - there).abs().max().item()
    return [{"case": "patches", "equal": str(torch.equal(here, there)), "gap_max": apart}]
