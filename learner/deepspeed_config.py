"""The configuration that DeepSpeed gets. As a command: whether DeepSpeed itself accepts it.

`python -m learner.deepspeed_config` reads a LearnerConfig in JSON. What DeepSpeed refuses is the last line
of stderr, with exit code 2.
"""

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from video_opd.config_learner import LearnerConfig


def deepspeed_config(learner: LearnerConfig) -> dict[str, Any]:
    """What this project decides, and learner.deepspeed."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": learner.micro_batch,
        "gradient_accumulation_steps": 1,  # update() sets the boundary: the number of micro-batches varies
        "gradient_clipping": learner.max_grad_norm,
        "bf16": {"enabled": learner.dtype == "bfloat16"},
        "zero_optimization": {"stage": learner.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also steps what is offloaded
        "steps_per_print": 10**9,
    }
    if learner.accumulation_dtype != learner.dtype:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, learner.deepspeed)


def _merged(ours: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Both; sections that both have are merged in turn."""
    merged = dict(ours)
    for key, value in further.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def refusal(learner: LearnerConfig) -> str | None:
    """What DeepSpeed itself finds wrong with its configuration; None: nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepspeed_config(learner))
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return f"{error.title}: {'; '.join(found)}"
    except Exception as error:  # each section raises its own kinds
        return " ".join(str(error).split())
    return None


if __name__ == "__main__":
    if found := refusal(LearnerConfig.model_validate_json(sys.stdin.read())):
        print(found, file=sys.stderr)
        sys.exit(2)
