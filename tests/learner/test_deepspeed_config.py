"""What DeepSpeed is configured with, and what is refused before it starts."""

from pathlib import Path

import pytest

from learner.deepspeed_config import deepspeed_config, refusal
from video_opd.config_file import load_config
from video_opd.config_learner import LearnerConfig
from video_opd.errors import ConfigError

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
ZERO = "learner.deepspeed.zero_optimization"


def test_the_demos_configuration_of_deepspeed_has_no_other_numerics():
    assert deepspeed_config(load_config(DEMO).learner) == {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


@pytest.mark.parametrize(
    ("options", "adds_in"),
    [
        ({"zero_stage": 3}, "fp32"),
        ({"zero_stage": 2}, "fp32"),
        ({"zero_stage": 2, "grad_accum_dtype": "bfloat16"}, None),
        ({"zero_stage": 1}, None),
        ({"zero_stage": 0}, None),
        ({"zero_stage": 2, "dtype": "float32"}, None),
        ({"zero_stage": 0, "dtype": "float32", "grad_accum_dtype": "float32"}, None),
    ],
)
def test_gradients_add_in_float32_where_deepspeed_can(options, adds_in):
    types = deepspeed_config(LearnerConfig(**options)).get("data_types", {})
    assert types.get("grad_accum_dtype") == adds_in


def test_keys_given_by_the_dot_are_merged_into_ours():
    learner = load_config(
        DEMO,
        [f"{ZERO}.offload_optimizer.device=cpu", f"{ZERO}.overlap_comm=true", f"{ZERO}.sub_group_size=1000"],
    ).learner
    assert deepspeed_config(learner)["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "overlap_comm": True,
        "sub_group_size": 1000,
    }


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["learner.deepspeed.bf16.enabled=false"], "deepspeed.bf16: set learner.dtype"),
        (["learner.deepspeed.train_batch_size=8"], "set groups_per_step"),
        (["learner.deepspeed.zero_optimisation.stage=1"], "did you mean zero_optimization?"),
        (
            ["learner.deepspeed.elasticity.enabled=true"],
            "deepspeed.elasticity: it passes on zero_opt",
        ),
        ([f"{ZERO}.stage=3"], "zero_optimization.stage: set learner.zero_stage"),
        ([f"{ZERO}.cpu_offload=true"], "set zero_optimization.offload_optimizer.device"),
        ([f"{ZERO}=3"], "zero_optimization=3 must be a mapping"),
        ([f"{ZERO}.offload_optimizer=cpu"], "offload_optimizer='cpu' must be a mapping"),
        ([f"{ZERO}.offload_optimizer.device=cpu", "learner.zero_stage=0"], "needs zero_stage=1, not 0"),
        ([f"{ZERO}.offload_optimizer.device=nvme"], "offload_optimizer.device=nvme: a resume would lose"),
        ([f"{ZERO}.offload_param.device=cpu"], "offload_param.device=cpu needs zero_stage=3, not 2"),
        ([f"{ZERO}.offload_optimizer={{device: cpu, ratio: 0.5}}"], "learner.lr does not reach"),
        (["learner.grad_accum_dtype=bfloat16"], "would round gradients of dtype=float32"),
        (
            ["learner.dtype=bfloat16", "learner.zero_stage=1", "learner.grad_accum_dtype=float32"],
            "grad_accum_dtype=float32 needs zero_stage=2 or 3, not 1",
        ),
        (["learner.attn_implementation=flex_attention"], "'eager'"),
        (["learner.attn_implementation=flash_attention_2"], "computes in bfloat16 on a GPU: use sdpa"),
        (["teacher_pool.attn_implementation=flash_attention_3"], "computes in bfloat16 on a GPU: use sdpa"),
        (
            ["teacher_pool.attn_implementation=eager", "teacher_pool.engine=vllm"],
            "does nothing for engine=vllm",
        ),
    ],
)
def test_what_the_learner_cannot_take_is_one_line(overrides, named):
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, overrides)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("deepspeed", "named"),
    [
        ({"zero_optimization": {"sub_group_size": 1000, "overlap_comm": True}}, None),
        ({"zero_optimization": {"sub_group_sizee": 1000}}, "DeepSpeedZeroConfig: sub_group_sizee: Extra"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cp"}}}, "offload_optimizer.device: Input"),
        ({"communication_data_type": "fp31"}, "Invalid communication_data_type"),
        ({"comms_logger": {"enabledd": True}}, "CommsLoggerConfig: enabledd: Extra"),
        ({"comms_logger": {"enabled": True}, "wall_clock_breakdown": True}, None),
    ],
)
def test_deepspeed_itself_is_asked_about_the_rest(deepspeed, named):
    found = refusal(LearnerConfig(deepspeed=deepspeed))
    assert found == named if named is None else named in str(found) and "\n" not in str(found)
