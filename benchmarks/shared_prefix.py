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

import itertools
import os
import statistics
import sys
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
VIDEO_TOKENS, PHASES, WAYS = (512, 2048), ("score", "update"), ("trees", "alone", "padded")
SEED, REPEATS = 0, 3
Numbers = tuple[int, int, int]  # queries of a clip, rollouts of a query, video tokens


class Run:
    """One phase of one case."""

    def __init__(self, case: Any, phase: Any, config: Any):
        from benchmarks import shared_prefix_parts as parts

        self.parts, self.case, self.phase, self.on_gpu = parts, case, phase, case.device == "cuda"
        self.step = parts.Step(case, config, phase.encoder, SEED)

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
        """Bytes above what is in use before; on a CPU see giving_back."""
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
        others = [self.run(way, "result") for way in WAYS[1:]]
        measure: Any = difference if isinstance(trees, np.ndarray) else relative_difference
        decodes = self.phase.encoder.frame_cache.num_decodes
        per_clip = {"decodes": decodes / self.case.clips, "vision_passes": passes / self.case.clips}
        return per_clip | {"difference": max(measure(trees, other) for other in others)}

    def sizes(self) -> Row:
        """Tokens of prefixes and branches, and computed ones over separate ones."""
        from video_opd.models.forward import collate

        prompts, responses = self.step.prompts, self.step.responses
        trees = collate(prompts, responses, 0, with_pixels=False).trees
        branches = [n for tree in trees for n in tree.branches]
        longest = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
        computed, separate = (sum(t.num_tokens for t in trees), sum(t.num_separate_tokens for t in trees))
        of_pass = computed * self.case.per_pass("trees") / len(prompts)
        assert of_pass <= longest * self.parts.PADDED, "a pass of trees is larger than a padded one"
        between = f"{min(branches)} to {max(branches)}"
        return {"prefix": trees[0].prefix, "branches": between, "tokens": computed / separate}


@contextmanager
def giving_back() -> Iterator[None]:
    """Processes that are started inside have no more memory than their tensors need: they keep none."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # bytes; glibc gives larger blocks back at once
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def relative_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest of all parameters: the norm of the difference over that of the gradient."""
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in theirs.items()}
    apart = {name: float(np.linalg.norm(ours[name] - theirs[name])) for name in theirs}
    return max(apart[name] / norm if norm else apart[name] for name, norm in norms.items())


def runs_of(numbers: Numbers, device: str, folder: str) -> list[Run]:
    """A run of each phase. Each has a cache of frames, as if it were alone on its node."""
    import torch

    from benchmarks import shared_prefix_parts as parts

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    case, runs = parts.Case(*numbers, device), []
    inputs = parts.write_inputs(case, Path(folder))
    for phase, engine in zip(PHASES, (parts.Teacher, parts.Learner), strict=True):
        config = parts.make_config(case, inputs, Path(folder) / phase)
        runs.append(Run(case, engine(config), config))
    return runs


def measure(numbers: Numbers, device: str, repeats: int) -> list[Row]:
    """Of each phase. Run it in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(numbers, device, folder)
        rows = [run.sizes() | run.exactness() for run in runs]
        spent = [[{way: run.seconds(way) for way in WAYS} for _ in range(repeats)] for run in runs]
    return [row | compare(of_run) for row, of_run in zip(rows, spent, strict=True)]


def measure_peaks(numbers: Numbers, device: str) -> list[Row]:
    """The same. The first of two passes also takes what stays."""
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(numbers, device, folder)
        peaks = [{way: min(run.peak(way), run.peak(way)) for way in WAYS} for run in runs]
    return [
        {"peak_ratio": of["trees"] / of["padded"]} | {f"{way}_peak_bytes": of[way] for way in WAYS}
        for of in peaks
    ]


def compare(spent: Sequence[dict[str, float]]) -> Row:
    """Of one phase; spent: seconds by way, of each repeat."""
    ways = {way: statistics.median(of[way] for of in spent) for way in WAYS}
    ratios = [of["trees"] / min(of["alone"], of["padded"]) for of in spent]
    row = {"ratio": ways["trees"] / min(ways["alone"], ways["padded"])}
    row |= {"lowest": min(ratios), "highest": max(ratios)}
    row |= {f"ratio_{way}": ways["trees"] / ways[way] for way in ("alone", "padded")}
    return row | {f"{way}_s": seconds for way, seconds in ways.items()}


def rows_of(numbers: Numbers, device: str, repeats: int) -> list[Row]:
    names = dict(zip(("queries", "rollouts", "video_tokens"), numbers, strict=True)) | {"device": device}
    measured = in_new_process(measure, numbers, device, repeats)
    with giving_back():
        peaks = in_new_process(measure_peaks, numbers, device)
    both = zip(PHASES, measured, peaks, strict=True)
    return [names | {"phase": phase} | row | of_peak for phase, row, of_peak in both]


def summary(rows: Sequence[Row]) -> Row:
    """The result."""
    worst = {phase: max(row["difference"] for row in rows if row["phase"] == phase) for phase in PHASES}
    result: Row = {"rows": list(rows), "max_logprob_diff": worst["score"]}
    return result | {"max_gradient_diff": worst["update"], "seed": SEED}


def main() -> None:
    parser = make_parser("shared_prefix", __doc__, "512 video tokens")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all that are here")
    asked, rows = parser.parse_args(), []
    os.environ["OMP_NUM_THREADS"] = "1"
    devices = asked.devices or (["cpu", "cuda"] if in_new_process(has_gpu) else ["cpu"])
    tokens = VIDEO_TOKENS[:1] if asked.quick else VIDEO_TOKENS
    for device, most, pair in itertools.product(devices, tokens, QUERIES_AND_ROLLOUTS):
        rows += rows_of((*pair, most), device, REPEATS)
        print(*rows[-len(PHASES) :], sep="\n", file=sys.stderr, flush=True)  # in case the rest takes too long
    shown = [{key: value for key, value in row.items() if not key.endswith(("_s", "_bytes"))} for row in rows]
    note = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, seed {SEED}, {REPEATS} repeats"
    print_result(summary(rows), "trees beside sequences apart; 8 sequences a step", shown, note)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
