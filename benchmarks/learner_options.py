"""What the learner's options save: seconds of an update and optimizer state, with nothing else running.

`python -m benchmarks.learner_options [--quick]`: sft on the demo without teacher and actors, several epochs
over few clips; medians from the second epoch on. The last line is one JSON object.
"""

from collections.abc import Sequence

import numpy as np

import launch
from benchmarks.command import Row, in_new_process, make_parser, print_result, temporary_demo
from driver.records.sinks import read_metrics

GROUPS, EPOCH_STEPS, NUM_EPOCHS = 64, 5, 4
FROZEN, LORA = "learner.freeze_vision=true", "learner.lora_rank=8"
KEPT = "learner.vision_cache_bytes=1000000000"
OPTIONS = {
    "all weights": ["learner.freeze_vision=false"],
    "frozen vision": [FROZEN],
    "frozen vision, features kept": [FROZEN, KEPT],
    "LoRA rank 8": [LORA, FROZEN],
    "LoRA rank 8, features kept": [LORA, FROZEN, KEPT],
}


def measure(options: Sequence[str], num_epochs: int) -> Row:
    num_steps = num_epochs * EPOCH_STEPS
    overrides = ["loss={kind: sft}", "teacher=null", "rollout.num_actors=0", "max_policy_lag=0"]
    overrides += [f"groups_per_step={GROUPS}", f"data.train.max_prompts={GROUPS * EPOCH_STEPS}"]
    with temporary_demo(*overrides, f"num_steps={num_steps}", *options) as (config, folder):
        launch.launch(config)
        lines = read_metrics(folder)[EPOCH_STEPS:]
        states = folder.glob(f"checkpoints/step-{num_steps}/deepspeed/state/*optim_states*")
        size = sum(path.stat().st_size for path in states)
    update_s = float(np.median([line["time/update_s"] for line in lines]))
    hits = float(np.mean([line.get("learner/vision_cache_hit_frac", 0.0) for line in lines]))
    return {"update_s": update_s, "optimizer_bytes": size, "hit_frac": hits}


def main() -> None:
    quick = make_parser("learner_options", __doc__, "two epochs").parse_args().quick
    epochs = 2 if quick else NUM_EPOCHS
    rows = {name: in_new_process(measure, options, epochs) for name, options in OPTIONS.items()}
    all_s, shown = rows["all weights"]["update_s"], []
    for name, row in rows.items():
        shown.append({"options": name} | row | {"of_all_weights": row["update_s"] / all_s})
    print_result(rows, f"{GROUPS} demonstrations an update", shown)


if __name__ == "__main__":
    main()
