"""Sequences of a clip as trees, in which what they share is computed once, beside the same sequences apart.

`python -m benchmarks.shared_prefix [--quick]`. A tiny Qwen3-VL of random weights in float32, real mp4 clips,
the default prompt, random responses of 20 to 60 tokens, steps of 8 sequences. Phases: `score`, encoding and
TransformersEngine; `update`, a whole update of the learner's engine with gradient checkpoints: encoding, both
passes, DeepSpeed's step. Each in three ways:

trees: as the system does it, in passes that have no more tokens than those of padded sequences.
alone: the same code with one sequence in a pass.
padded: transformers' own forward over 4 right-padded sequences in a pass, each with the pixels of its clip.

`ratio`: CPU seconds (on a GPU: seconds) of trees over those of the faster other way, medians of repeats in
turn. `peak_ratio`: the most memory of a pass over that of the padded one, each above what was in use before.
Decodes and vision passes are for each distinct clip of a step. The last line is one JSON object.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import Row, in_new_process, make_parser, print_result
from benchmarks.memory import peak_bytes, reset_peak

QUERIES_AND_ROLLOUTS = ((1, 1), (4, 1), (1, 8))
VIDEO_TOKENS, PHASES = (512, 2048), ("score", "update")
SEED = 0
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the process gives tensors back as soon as they are freed


class Run:
    """One phase of one case, in a process of its own."""

    def __init__(self, phase: str, numbers: Sequence[int], device: str, folder: Path):
        import torch

        from benchmarks import shared_prefix_parts as parts

        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        self.parts, self.case, self.on_gpu = parts, parts.Case(*numbers, device), device == "cuda"
        config = parts.make_config(self.case, folder)
        self.phase = (parts.Teacher if phase == "score" else parts.Learner)(config)
        self.step = parts.Step(self.case, config, self.phase.encoder, SEED)

    def run(self, way: Any, what: str = "run") -> Any:
        with self.parts.computing(way):
            return getattr(self.phase, what)(self.step, self.case.per_pass(way))

    def seconds(self, way: Any) -> float:
        """Of the CPU; of a GPU, by the clock."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            started = time.perf_counter()
            self.run(way)
            torch.cuda.synchronize()
            return time.perf_counter() - started
        started = time.process_time()
        self.run(way)
        return time.process_time() - started

    def peak(self, way: Any) -> int:
        """Bytes above what is in use before."""
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(way)
            return torch.cuda.max_memory_allocated() - before
        before = reset_peak()
        self.run(way)
        return peak_bytes() - before

    def exactness(self) -> Row:
        """How the results of trees differ from those of the other ways; and what trees compute and read."""
        trees, passes = self.parts.counted(self.phase.model, lambda: self.run("trees", "result"))
        others = [self.run(way, "result") for way in self.parts.WAYS[1:]]
        measure = difference if isinstance(trees, np.ndarray) else relative_difference
        decodes = self.phase.encoder.frame_cache.num_decodes
        per_clip = {"decodes": decodes / self.case.clips, "vision_passes": passes / self.case.clips}
        return per_clip | {"difference": max(measure(trees, other) for other in others)}

    def sizes(self) -> Row:
        """Tokens: of prefixes and branches, and of the largest pass of trees over one of padded sequences."""
        from video_opd.models.forward import collate

        prompts, responses = self.step.encode(self.phase.encoder), self.step.responses
        trees = collate(prompts, responses, 0, with_pixels=False).trees
        branches = [n for tree in trees for n in tree.branches]
        width = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
        passes = self.parts.SEQUENCES / self.case.per_pass("trees")
        computed = sum(tree.num_tokens for tree in trees)
        assert computed / passes <= self.parts.PADDED * width, "passes of trees are larger than padded ones"
        separate = sum(tree.num_separate_tokens for tree in trees)
        between = f"{min(branches)} to {max(branches)}"
        return {"prefix": trees[0].prefix, "branches": between, "tokens": computed / separate}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def relative_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest of all parameters: the norm of the difference over that of the gradient."""
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in theirs.items()}
    apart = {name: float(np.linalg.norm(ours[name] - theirs[name])) for name in theirs}
    return max(apart[name] / norm if norm else apart[name] for name, norm in norms.items())


def measure(phase: str, numbers: Sequence[int], device: str, repeats: int) -> Row:
    """One row without its peak."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(phase, numbers, device, Path(folder))
        row = run.sizes() | run.exactness()
        seconds = [{way: run.seconds(way) for way in run.parts.WAYS} for _ in range(repeats)]
    ways = {way: statistics.median(of[way] for of in seconds) for way in run.parts.WAYS}
    best = min(ways["alone"], ways["padded"])
    ratios = [of["trees"] / min(of["alone"], of["padded"]) for of in seconds]
    row |= {f"{way}_s": spent for way, spent in ways.items()}
    row |= {"ratio": ways["trees"] / best, "lowest": min(ratios), "highest": max(ratios)}
    return row | {f"ratio_{way}": ways["trees"] / ways[way] for way in ("alone", "padded")}


def measure_peaks(phase: str, numbers: Sequence[int], device: str) -> dict[str, int]:
    """By way."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(phase, numbers, device, Path(folder))
        for way in run.parts.WAYS:  # what is kept from the first time on
            run.run(way)
        return {way: run.peak(way) for way in run.parts.WAYS}


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Of processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def compare(phase: str, numbers: Sequence[int], device: str, repeats: int) -> Row:
    """One row."""
    names = dict(zip(("queries", "rollouts", "video_tokens"), numbers, strict=True))
    row = names | {"phase": phase, "device": device}
    row |= in_new_process(measure, phase, numbers, device, repeats)
    with environment(KEEP_NOTHING):
        peaks = in_new_process(measure_peaks, phase, numbers, device)
    row["peak_ratio"] = peaks["trees"] / peaks["padded"]
    return row | {f"{way}_peak_bytes": peak for way, peak in peaks.items()}


def summary(rows: Sequence[Row]) -> Row:
    """The result."""
    worst = {phase: max(row["difference"] for row in rows if row["phase"] == phase) for phase in PHASES}
    result: Row = {"rows": list(rows), "max_logprob_diff": worst["score"]}
    return result | {"max_gradient_diff": worst["update"], "seed": SEED}


def main() -> None:
    quick = make_parser("shared_prefix", __doc__, "512 video tokens and 3 repeats").parse_args().quick
    os.environ["OMP_NUM_THREADS"] = "1"
    devices = ["cpu", "cuda"] if in_new_process(has_gpu) else ["cpu"]
    rows = []
    for device in devices:
        for video_tokens in VIDEO_TOKENS[:1] if quick else VIDEO_TOKENS:
            for numbers in ((*pair, video_tokens) for pair in QUERIES_AND_ROLLOUTS):
                rows += [compare(phase, numbers, device, 3 if quick else 7) for phase in PHASES]
    shown = [{key: value for key, value in row.items() if not key.endswith(("_s", "_bytes"))} for row in rows]
    note = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, seed {SEED}"
    print_result(summary(rows), "trees beside sequences apart; 8 sequences a step", shown, note)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
