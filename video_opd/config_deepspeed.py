"""The keys of `learner.deepspeed`: which the learner passes on to DeepSpeed, and which it sets itself."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

ZERO = "zero_optimization"
# DeepSpeed ignores unknown keys beside its sections, and others would not act on this learner.
PASSED = (ZERO, "comms_logger", "communication_data_type", "memory_breakdown", "wall_clock_breakdown")
OWN = {  # key -> the key of this project, or the reason
    "train_batch_size": "set groups_per_step",
    "train_micro_batch_size_per_gpu": "set learner.micro_batch",
    "gradient_accumulation_steps": "it follows from groups_per_step and learner.micro_batch",
    "gradient_clipping": "set learner.max_grad_norm",
    "gradient_allreduce_op": "gradients are summed over one denominator",
    "bf16": "set learner.dtype",
    "fp16": "set learner.dtype",
    "data_types": "set learner.grad_accum_dtype",
    "optimizer": "set learner.lr, betas and weight_decay",
    "scheduler": "set learner.warmup_frac and final_lr_frac",
}
OWN_ZERO = {
    "stage": "set learner.zero_stage",
    "cpu_offload": f"set {ZERO}.offload_optimizer.device",
    "cpu_offload_param": f"set {ZERO}.offload_param.device",
    "cpu_offload_use_pin_memory": f"set pin_memory in {ZERO}.offload_optimizer",
    "compute_grad_norm": "learner.max_grad_norm needs the norm",
    "zenflow": "it has an optimizer of its own",
}
NEEDED_STAGE = {"offload_optimizer": 1, "offload_param": 3}


def problems(deepspeed: Mapping[str, Any], zero_stage: int) -> Iterator[str]:
    """Yields what cannot be passed on. DeepSpeed itself checks the rest: preflight/options.py."""
    name = "deepspeed"
    for key in [k for k in deepspeed if k not in PASSED]:
        near = difflib.get_close_matches(key, PASSED, n=1)
        other = f"did you mean {near[0]}?" if near else f"it passes on {', '.join(PASSED)}"
        yield f"{name}.{key}: {OWN.get(key, other)}"
    zero = deepspeed.get(ZERO, {})
    if not isinstance(zero, Mapping):
        yield f"{name}.{ZERO}={zero!r} must be a mapping"
        return
    for key in [k for k in zero if k in OWN_ZERO]:
        yield f"{name}.{ZERO}.{key}: {OWN_ZERO[key]}"
    for key, stage in NEEDED_STAGE.items():
        section = zero.get(key) or {}
        where = f"{name}.{ZERO}.{key}"
        if not isinstance(section, Mapping):
            yield f"{where}={section!r} must be a mapping"
            continue
        if (device := section.get("device", "none")) == "none":
            continue
        if device == "nvme":
            yield f"{where}.device=nvme: a resume would lose states that DeepSpeed keeps there; use cpu"
        if zero_stage < stage:
            yield f"{where}.device={device} needs zero_stage={stage}, not {zero_stage}"
        if section.get("super_offload") or section.get("ratio", 1) != 1:
            yield f"{where}: ratio and super_offload step with an optimizer that learner.lr does not reach"
