"""What DeepSpeed's ZeRO divides between ranks: bytes of one rank, by formula.

preflight/activations.py explains the letters.
"""

from preflight.adapters import VISION, adapters
from preflight.model_shapes import DTYPE_BYTES, ModelShapes, Parameters, count, parameters
from video_opd.config import Config
from video_opd.config_learner import LearnerConfig

# DeepSpeed 0.19's defaults, in numbers rather than bytes (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000


def trained(shapes: ModelShapes, learner: LearnerConfig) -> Parameters:
    """All but a frozen vision tower; with lora_rank r only r (inputs + outputs) for each of lora_targets."""
    if learner.lora_rank:
        return adapters(shapes, learner)
    of = parameters(shapes)
    return {n: s for n, s in of.items() if not (learner.freeze_vision and n.startswith(VISION))}


def optimizer_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """One rank's Adam moments 8T, masters 4T; ZeRO 1 to 3 divide both by n.

    In float32 the weights are the masters at stages 0 and 3 (_create_fp32_partitions in
    deepspeed/runtime/zero/stage3.py); stages 1 and 2 copy them (stage_1_and_2.py)."""
    ranks = learner.world_size if learner.zero_stage else 1
    has_masters = learner.dtype == "bfloat16" or learner.zero_stage in (1, 2)
    masters = 4 * num_trained // ranks if has_masters else 0
    return {"optimizer moments": 8 * num_trained // ranks, "float32 masters": masters}


def gradient_bytes(of: Parameters, learner: LearnerConfig) -> dict[str, int]:
    """One rank's gradients aT, with ZeRO-2 and 3 aT / n, and with ZeRO a bucket, c reduce_bucket_size.

    a: bytes in grad_accum_dtype, c: in communication_data_type, else e. If they differ, a rank's part of the
    bucket is converted. At stages 1 and 2 overlap_comm takes two buckets. Beside it is what is reduced: its
    copy (reduce_scatter_coalesced in deepspeed/runtime/comm/coalesced_collectives.py, allreduce_bucket in
    zero/stage_1_and_2.py), or a gradient that is larger. For what is added on the host see offload_bytes."""
    num_trained = count(of)
    e, a = DTYPE_BYTES[learner.dtype], DTYPE_BYTES[learner.accumulation_dtype]
    c = {"fp32": 4, "fp16": 2, "bf16": 2}.get(learner.deepspeed.get("communication_data_type", ""), e)
    ranks = learner.world_size if learner.zero_stage >= 2 else 1
    gradients = {} if adds_on_host(learner) else {"gradients": a * num_trained // ranks}
    if not learner.zero_stage:
        return gradients
    size = int(learner.zero_option("reduce_bucket_size", REDUCE_BUCKET))
    filled = min(size, num_trained)
    bucket = size if learner.num_gpus else filled
    beside = max([filled, *(count({name: shape}) for name, shape in of.items())])
    copies = 2 if learner.zero_stage < 3 and learner.zero_option("overlap_comm", False) else 1
    converted = a * bucket // ranks if a != c else 0
    return gradients | {"gradient buckets": c * (copies * bucket + beside) + converted}


def adds_on_host(learner: LearnerConfig) -> bool:
    """Whether offloaded gradients of micro-batches are added on the host. ZeRO-2 adds float32 on the GPU."""
    converts = learner.accumulation_dtype != learner.dtype
    on_host = learner.zero_stage == 3 or (learner.zero_stage == 2 and not converts)
    return on_host and learner.offload("optimizer") != "none"


def offload_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """One rank's host memory with offload_optimizer, for each of T / n: moments 8, masters 4, and roots 4.

    Gradients are float32, 4, and a for the sum of micro-batches, which ZeRO-2 has on the device if it is
    float32. ZeRO-1 and 2 keep the new weights there too, e. ZeRO-3 steps SUB_GROUP at a time."""
    part = num_trained // learner.world_size
    on_device = learner.zero_stage == 2 and not adds_on_host(learner)
    summed = 0 if on_device else DTYPE_BYTES[learner.accumulation_dtype]
    weights = 0 if learner.zero_stage == 3 else DTYPE_BYTES[learner.dtype]
    sub_group = int(learner.zero_option("sub_group_size", SUB_GROUP))
    roots = 4 * (min(part, sub_group) if learner.zero_stage == 3 else part)
    states = optimizer_bytes(num_trained, learner)
    return states | {"offloaded gradients": (4 + summed + weights) * part, "roots": roots}


def weight_bytes(shapes: ModelShapes, learner: LearnerConfig) -> dict[str, int]:
    """One rank's weights eP; with ZeRO-3 eP / n, and those gathered: max_live_parameters or the largest."""
    e, of = DTYPE_BYTES[learner.dtype], parameters(shapes)
    total = count(of)
    if learner.zero_stage < 3:
        return {"weights": e * total}
    largest = max(count({n: s}) for n, s in of.items())
    live = int(learner.zero_option("stage3_max_live_parameters", LIVE_PARAMETERS))
    gathered = min(total, max(live, largest))
    return {"weights": e * total // learner.world_size, "gathered weights": e * gathered}


def sending_bytes(shapes: ModelShapes, config: Config) -> int:
    """What a rank's GPU holds beside its weights while it publishes. collective: three buffer_bytes.

    Of weights that are gathered or merged, object_store: one buffer_bytes; ipc: eP, since vLLM keeps every
    tensor until the actors have read all (_send_unpacked in vllm/distributed/weight_transfer/ipc_engine.py).
    Others are read where they are."""
    learner, way = config.learner, config.weight_transfer
    if way == "collective":
        return 3 * buffer_bytes(shapes, learner)
    if (
        not learner.num_gpus
        or learner.publishes_adapters
        or (learner.zero_stage < 3 and not learner.lora_rank)
    ):
        return 0
    return (
        DTYPE_BYTES[learner.dtype] * count(parameters(shapes))
        if way == "ipc"
        else buffer_bytes(shapes, learner)
    )


def buffer_bytes(shapes: ModelShapes, learner: LearnerConfig) -> int:
    """Tensors until they exceed bucket_bytes: at most that and the largest, or eP.

    By NCCL both sides fill two such buffers in turn; the sender holds the tensors of one, too (pack_tensors
    in vllm/distributed/weight_transfer/packed_tensor.py)."""
    e, of = DTYPE_BYTES[learner.dtype], parameters(shapes)
    return min(learner.bucket_bytes + e * max(count({n: s}) for n, s in of.items()), e * count(of))


def step_bytes(num_trained: int, learner: LearnerConfig) -> int:
    """The optimizer step's float32 gradients 4T / n and AdamW's roots 4T / n; ZeRO-3: SUB_GROUP at a time.

    Nothing with offload_optimizer; no gradients where the sum of the micro-batches' is used as it is."""
    if learner.offload("optimizer") != "none":
        return 0
    part = num_trained // (learner.world_size if learner.zero_stage else 1)
    if learner.zero_stage == 3:
        part = min(part, int(learner.zero_option("sub_group_size", SUB_GROUP)))
    converts = learner.accumulation_dtype != learner.dtype
    as_it_is = learner.dtype == "float32" if learner.zero_stage == 0 else learner.zero_stage == 2 and converts
    return part * (4 if as_it_is else 8)
