"""Seconds and memory of whole models on one GPU, beside the plan of `--dry-run`, without Ray and vLLM.

`python -m benchmarks.gpu_step [--quick] [--device cpu] [--cases NAME ...] [--repeats N] [--profile]`: models
of random weights at published shapes and depth, made on the GPU, in bfloat16; prompts of the check's clips,
about 8,000 video tokens each. `score` is a pass of the teacher's transformers engine for each tree, `update`
a whole update of the learner's engine. `alone`: one sequence a pass; `tree`: 8 responses to each prompt in
one pass. Each case has a process. `seconds`: the median of the repeats after one more; `reached`: the
operations of the plan a second, over the GPU's datasheet; `of_matmul`: over a product of 8,192-wide bfloat16
matrices, measured first. `gap`: of log-probs, the mean and the largest difference from transformers' own
forward over each sequence. `peak_GiB` is of the whole process, `kept_GiB` what torch's allocator held. The
last line is one JSON object. The case `attention` is one layer's attention of an 8B model by itself.
"""

import sys
import tempfile
from dataclasses import dataclass

from benchmarks.command import Row, in_new_process, make_parser, print_result
from benchmarks.gpu_check.part import Bench
from benchmarks.gpu_check.process import describe_machine, has_gpu


@dataclass(frozen=True)
class Case:
    """What is measured."""

    size: str  # of Qwen3-VL
    phase: str  # score, update
    how: tuple[str, ...] = ()  # values beside zero_stage=2, gradient_checkpointing and freeze_vision

    @property
    def model(self) -> str:
        return f"Qwen3-VL-{self.size}-Instruct"


CASES = {
    "score-2b": Case("2B", "score"),
    "score-8b": Case("8B", "score"),
    "score-32b": Case("32B", "score"),
    "update-2b": Case("2B", "update"),
    "update-2b-zero3": Case("2B", "update", ("learner.zero_stage=3",)),
    "update-2b-no-checkpoints": Case("2B", "update", ("learner.gradient_checkpointing=false",)),
    "update-2b-vision": Case("2B", "update", ("learner.freeze_vision=false",)),
    "update-4b": Case("4B", "update"),
    "update-8b-lora": Case("8B", "update", ("learner.lora_rank=16",)),
}
ALL = ("matmul", "attention", "patches", *CASES)


def run(name: str, bench: Bench, repeats: int, profiles: bool) -> list[Row]:
    """The rows of a case, in this process."""
    from benchmarks import gpu_step_parts as parts
    from benchmarks.gpu_step_attention import attention

    if name == "attention":
        return attention(bench, repeats)
    if name in ("matmul", "patches"):
        return getattr(parts, name)(bench, repeats)
    case = CASES[name]
    whole = parts.PHASES[case.phase](bench, case.how)
    return [{"case": name, "way": way} | whole.measure(way, repeats, profiles) for way in parts.WAYS]


def main() -> None:
    parser = make_parser("gpu_step", __doc__, "tiny models and clips")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", choices=ALL, default=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, after one more")
    parser.add_argument("--profile", action="store_true", help="show the kernels that take most time")
    asked = parser.parse_args()
    if asked.device == "cuda" and not in_new_process(has_gpu):
        parser.error("torch sees no GPU here: use --device cpu --quick")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.cases:
            model = CASES[name].model if name in CASES else CASES["score-8b"].model
            bench = Bench(model, folder, asked.device, asked.quick)
            try:
                found = in_new_process(run, name, bench, asked.repeats, asked.profile)
            except Exception as error:  # the other cases go on
                found = [{"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}]
            rows += found
            print(*found, sep="\n", file=sys.stderr, flush=True)
    machine = in_new_process(describe_machine, asked.device)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = [{key: row.get(key) for key in keys} for row in rows]
    print_result({"rows": rows} | machine, f"whole models on {machine['device']}", shown)
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
