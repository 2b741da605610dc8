"""What the curriculum costs: selection over a million prompts by every sampler, and its share of a step of the demo.

`python -m benchmarks.curriculum [--quick]`. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import launch
from benchmarks.memory import peak_bytes, reset_peak
from curriculum.scheduler import Scheduler
from curriculum.tvdf import SAMPLERS
from driver.records.sinks import read_metrics
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.types import Clip, Prompt

WARM_UP_STEPS = 2
NUM_SELECTED = 100_000
PROMPTS_A_VIDEO = 10


def demo_config(overrides: list[str]) -> Config:
    return load_demo(overrides)


def make_prompts(num_prompts: int) -> list[Prompt]:
    """References to clips that do not exist: selection opens none."""
    clips = [
        Clip(
            clip_id=f"v{i}",
            video_path=f"/nowhere/v{i}.mp4",
            num_video_frames=48,
            video_fps=4.0,
            duration_s=12.0,
            frame_indices=np.arange(0, 48, 2),
            frame_size=(32, 32),
        )
        for i in range(num_prompts // PROMPTS_A_VIDEO)
    ]
    return [
        Prompt(
            prompt_id=f"p{i}",
            clip=clips[i // PROMPTS_A_VIDEO],
            query="the red square is visible",
            answer_spans_s=((2.0, 5.0),),
        )
        for i in range(num_prompts)
    ]


def select(kind: str, sampler: str, num_prompts: int) -> dict:
    """One round over `num_prompts`, in a process of its own: seconds and bytes above what the pool itself takes."""
    overrides = [
        f"curriculum.kind={kind}",
        f"curriculum.num_selected={NUM_SELECTED}",
        f"curriculum.sampler={sampler}",
    ]
    scheduler = Scheduler(
        make_prompts(num_prompts), demo_config([*overrides, "curriculum.group_by_video=true"])
    )
    rng = np.random.default_rng(0)
    teacher_iou, student_iou = rng.uniform(0.5, 1, num_prompts), rng.uniform(0, 1, num_prompts)
    before, started = reset_peak(), time.perf_counter()
    scheduler.validate(teacher_iou)
    scheduler.start_round(student_iou, 0)
    selected = time.perf_counter()
    records = scheduler.records()
    recorded = time.perf_counter()
    scheduler.next_prompts(64)  # shuffles the first pass
    return {
        "kind": kind,
        "sampler": sampler,
        "select_s": selected - started,
        "records_s": recorded - selected,
        "first_prompts_s": time.perf_counter() - recorded,
        "peak_bytes": peak_bytes() - before,
        "selected": int(records["selected"].to_numpy().sum()),
    }


def share_of_step(num_steps: int) -> float:
    """Median share of a step of the demo in which callers wait for next_prompts."""
    with tempfile.TemporaryDirectory() as runs:
        rounds = ["curriculum.kind=tvdf", "curriculum.trpv=false", "curriculum.dbtp=false"]
        launch.launch(
            demo_config([*rounds, f"num_steps={num_steps}", f"runs_dir={runs}", "run_name=benchmark"])
        )
        lines = read_metrics(Path(runs) / "benchmark")[WARM_UP_STEPS:]
    return float(np.median([line["curriculum/next_prompts_s"] / line["time/step_s"] for line in lines]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curriculum", description=__doc__)
    parser.add_argument("--prompts", type=int, default=1_000_000, help="size of the pool")
    parser.add_argument("--quick", action="store_true", help="8 steps of the demo instead of 30")
    arguments = parser.parse_args()
    rows = []
    for kind, sampler in [*(("tvdf", name) for name in SAMPLERS), ("scc", "top_k")]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(select, (kind, sampler, arguments.prompts)))
    share = share_of_step(8 if arguments.quick else 30)
    table = Table(
        "kind",
        "sampler",
        "select s",
        "records to Arrow s",
        "first prompts s",
        "peak MiB",
        title=f"{arguments.prompts:,} prompts",
    )
    for row in rows:
        seconds = (f"{row[key]:.2f}" for key in ("select_s", "records_s", "first_prompts_s"))
        table.add_row(row["kind"], row["sampler"], *seconds, f"{row['peak_bytes'] / 2**20:.0f}")
    Console().print(table)
    print(f"next_prompts: {share:.2%} of a step of the demo")
    result = {
        "prompts": arguments.prompts,
        "max_select_s": max(row["select_s"] + row["records_s"] for row in rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "next_prompts_share_of_step": share,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
