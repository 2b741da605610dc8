"""Whether engines can load the models at all: quantized folders, and the parts of tensor parallelism."""

from collections.abc import Iterator, Sequence

from preflight.model_shapes import ModelShapes
from video_opd.config import Config, RolloutConfig, TeacherConfig
from video_opd.errors import ConfigError

PARTS = (1, 2, 4, 8, 16)


def parts_of(engine: RolloutConfig | TeacherConfig) -> int:
    """GPUs over which a vLLM engine is spread."""
    return engine.tensor_parallel if isinstance(engine, TeacherConfig) else 1


def check_engines(config: Config, student: ModelShapes, teachers: Sequence[ModelShapes]) -> None:
    """Raises ConfigError for the first model that its engine cannot load."""
    pool = config.teacher_pool
    if student.fp8:
        raise ConfigError(f"student {student.name} is in FP8, which cannot be trained: use it in bfloat16")
    for teacher in teachers if pool.engine == "transformers" else ():
        if teacher.fp8:
            raise ConfigError(f"teacher {teacher.name} is in FP8: set teacher_pool.engine=vllm")
    for teacher in teachers:
        if teacher.fp8 and pool.dtype != "bfloat16":
            raise ConfigError(f"teacher {teacher.name} is in FP8: set teacher_pool.dtype=bfloat16")
    engines = [("rollout", config.rollout, student)] if config.rollout.num_actors else []
    engines += [("teacher_pool", pool, teacher) for teacher in teachers]
    for section, engine, shapes in engines:
        if problem := next(_indivisible(shapes, parts_of(engine)), None):
            fitting = [str(n) for n in PARTS if not any(_indivisible(shapes, n))]
            cannot = f"{section}.tensor_parallel={parts_of(engine)} cannot divide {shapes.name}'s {problem}"
            remedy = f"use {' or '.join(fitting)}" if fitting else "use a folder without blocks of scales"
            raise ConfigError(f"{cannot}: {remedy}")


def _indivisible(shapes: ModelShapes, parts: int) -> Iterator[str]:
    """What vLLM 0.32 cannot divide into so many parts.

    Heads and MLPs of language model and vision tower must divide; key heads must divide or be a divisor
    (model_executor/models/qwen3.py). A part must have whole blocks of FP8 scales (validate_fp8_block_shape in
    layers/quantization/utils/fp8_utils.py)."""
    text, vision = shapes.text, shapes.vision
    whole = {
        "attention heads": text.heads,
        "MLP widths": text.intermediate,
        "vision heads": vision.heads,
        "vision MLP widths": vision.intermediate,
    }
    yield from (f"{size} {name}" for name, size in whole.items() if size % parts)
    if text.key_heads % parts and parts % text.key_heads:
        yield f"{text.key_heads} key heads"
    for side in sorted(set(shapes.fp8.block)) if shapes.fp8 and shapes.fp8.block else ():
        part = text.intermediate // parts
        if part % side:
            yield f"MLP: a part of {part} has no whole number of FP8 blocks of {side}"
        if text.head_dim % side and (text.query // parts) % side:
            yield f"attention: a part of {text.query // parts} has no whole number of FP8 blocks of {side}"
