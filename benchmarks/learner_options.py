"""What the learner's options save: seconds of an update and optimizer state, with nothing else running.

`python -m benchmarks.learner_options [--quick]`. sft on the demo without teacher and actors, several epochs over few clips;
medians from the second epoch on. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import launch
from driver.records.sinks import read_metrics
from video_opd.config_file import load_demo

GROUPS, EPOCH_STEPS, NUM_EPOCHS = 64, 5, 4
OPTIONS = {
    "all weights": ["learner.freeze_vision=false"],
    "frozen vision": ["learner.freeze_vision=true"],
    "frozen vision, features kept": ["learner.freeze_vision=true", "learner.vision_cache_bytes=1000000000"],
    "LoRA rank 8": ["learner.lora_rank=8", "learner.freeze_vision=true"],
    "LoRA rank 8, features kept": [
        "learner.lora_rank=8",
        "learner.freeze_vision=true",
        "learner.vision_cache_bytes=1000000000",
    ],
}


def measure(options: list[str], num_epochs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as runs:
        overrides = [
            "loss={kind: sft}",
            "teacher=null",
            "rollout.num_actors=0",
            "max_policy_lag=0",
            f"groups_per_step={GROUPS}",
            f"num_steps={num_epochs * EPOCH_STEPS}",
            f"data.train.max_prompts={GROUPS * EPOCH_STEPS}",
            f"runs_dir={runs}",
            "run_name=run",
            *options,
        ]
        launch.launch(load_demo(overrides))
        lines = read_metrics(Path(runs) / "run")[EPOCH_STEPS:]
        checkpoint = (
            Path(runs) / "run" / "checkpoints" / f"step-{num_epochs * EPOCH_STEPS}" / "deepspeed" / "state"
        )
        optimizer = sum(path.stat().st_size for path in checkpoint.glob("*optim_states*"))
    return {
        "update_s": float(np.median([line["time/update_s"] for line in lines])),
        "optimizer_bytes": optimizer,
        "hit_frac": float(np.mean([line.get("learner/vision_cache_hit_frac", 0.0) for line in lines])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner_options", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    epochs = 2 if parser.parse_args().quick else NUM_EPOCHS
    rows = {name: measure(options, epochs) for name, options in OPTIONS.items()}
    whole = rows["all weights"]["update_s"]
    table = Table(
        "",
        "s an update",
        "of all weights",
        "optimizer state MiB",
        "clips kept",
        title=f"{GROUPS} demonstrations an update",
    )
    for name, row in rows.items():
        share, state = f"{row['update_s'] / whole:.2f}", f"{row['optimizer_bytes'] / 2**20:.1f}"
        table.add_row(name, f"{row['update_s']:.2f}", share, state, f"{row['hit_frac']:.0%}")
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
