"""What the curriculum costs: a selection over a million prompts, by sampler, and its share of a demo step.

`python -m benchmarks.curriculum [--quick]`. The last line is one JSON object.
"""

import numpy as np

import launch
from benchmarks import command
from benchmarks.command import WARM_UP_STEPS, Row, in_new_process, timed
from benchmarks.memory import peak_bytes, reset_peak
from curriculum.scheduler import Scheduler
from curriculum.tvdf import SAMPLERS
from driver.records.sinks import read_metrics
from video_opd.config_file import load_demo
from video_opd.types import Prompt

NUM_SELECTED = 100_000
PROMPTS_A_VIDEO = 10


def make_prompts(num_prompts: int) -> list[Prompt]:
    """Prompts on videos that do not exist: selection opens none."""
    clips = [command.make_clip(f"v{i}") for i in range(num_prompts // PROMPTS_A_VIDEO)]
    query, answers = "the red square is visible", ((2.0, 5.0),)
    return [
        Prompt(prompt_id=f"p{i}", clip=clips[i // PROMPTS_A_VIDEO], query=query, answer_spans_s=answers)
        for i in range(num_prompts)
    ]


def select(kind: str, sampler: str, num_prompts: int) -> Row:
    """Seconds of one round, and the peak bytes above those of the prompts. Run it in a new process."""
    values = {"kind": kind, "num_selected": NUM_SELECTED, "sampler": sampler, "group_by_video": "true"}
    values |= {"scc.schedule": "false"} if kind == "scc" else {}
    config = load_demo([f"curriculum.{key}={value}" for key, value in values.items()])
    scheduler = Scheduler(make_prompts(num_prompts), config)
    rng = np.random.default_rng(0)
    teacher_iou, student_iou = rng.uniform(0.5, 1, num_prompts), rng.uniform(0, 1, num_prompts)

    def start_round() -> None:
        scheduler.validate(teacher_iou)
        scheduler.start_round(student_iou, 0)

    before = reset_peak()
    select_s, _ = timed(start_round)
    records_s, records = timed(scheduler.records)
    first_prompts_s, _ = timed(scheduler.next_prompts, 64)  # shuffles the first pass
    seconds = {"select_s": select_s, "records_s": records_s, "first_prompts_s": first_prompts_s}
    sizes = {"peak_bytes": peak_bytes() - before, "selected": int(records["selected"].to_numpy().sum())}
    return {"kind": kind, "sampler": sampler} | seconds | sizes


def share_of_step(num_steps: int) -> float:
    """Median share of a step of the demo in which callers wait for next_prompts."""
    rounds = ["curriculum.kind=tvdf", "curriculum.trpv=false", "curriculum.dbtp=false"]
    with command.temporary_demo(*rounds, f"num_steps={num_steps}") as (config, folder):
        launch.launch(config)
        lines = read_metrics(folder)[WARM_UP_STEPS:]
    return float(np.median([line["curriculum/next_prompts_s"] / line["time/step_s"] for line in lines]))


def main() -> None:
    parser = command.make_parser("curriculum", __doc__, "8 steps of the demo instead of 30")
    parser.add_argument("--prompts", type=int, default=1_000_000, help="size of the pool")
    arguments = parser.parse_args()
    kinds = [*(("tvdf", name) for name in SAMPLERS), ("scc", "top_k")]
    rows = [in_new_process(select, kind, sampler, arguments.prompts) for kind, sampler in kinds]
    share = share_of_step(8 if arguments.quick else 30)
    slowest_s = max(row["select_s"] + row["records_s"] for row in rows)
    largest = {"max_select_s": slowest_s, "peak_bytes": max(row["peak_bytes"] for row in rows)}
    result = {"prompts": arguments.prompts, **largest, "next_prompts_share_of_step": share, "rows": rows}
    note = f"next_prompts: {share:.2%} of a step of the demo"
    command.print_result(result, f"{arguments.prompts:,} prompts", rows, note)


if __name__ == "__main__":
    main()
