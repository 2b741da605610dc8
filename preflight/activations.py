"""What one pass through a model holds: bytes of activations, by formula.

Letters in the formulas, here and in preflight/memory.py:

    e   bytes of a number in the role's dtype: 2 in bfloat16, 4 in float32;  a those of accumulated gradients
    P   parameters of the model; T those that are trained; n data-parallel ranks
    H I L V   the language model's hidden and MLP widths, its layers, its vocabulary
    Q K   widths of all its query heads together, and of all its key heads
    h i o   the vision tower's hidden and MLP widths, and the width of its output;  D deepstack outputs
    B S R   sequences of a pass, its packed tokens (preflight/packing.py), its response tokens
    p   patches of the clips of a pass: merge^2 for each video token

They count the tensors of transformers' modules; tests/preflight/test_memory.py compares with real passes.
"""

from preflight.model_shapes import DTYPE_BYTES, ModelShapes
from preflight.packing import Attended
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.config_teachers import TeacherConfig


def logit_copies(loss: LossConfig) -> int:
    """Float32 copies of a chunk's logits [rows, V] at the peak of learner/loss.py and token_entropy."""
    if loss.needs.teacher != "hidden":
        return 5
    if loss.kind == "opd_full" and loss.divergence == "jsd":
        return 12
    return 8 if loss.forward_kl_entropy is None else 10


def text_layer_saved(shapes: ModelShapes, e: int) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass.

    Norms 2H (4 + 2e): float32 input, normalised, output. Qwen3's norms of queries and keys (Q + K)(4 + e).
    Attention 4eQ: queries, keys and values for all heads, output. MLP 4eI: gate, activation, up, product."""
    t = shapes.text
    head_norms = (t.query + t.key) * (4 + e) if shapes.is_qwen3 else 0
    return 2 * t.hidden * (4 + 2 * e) + head_norms + 4 * e * t.query + 4 * e * t.intermediate


def score_bytes(
    shapes: ModelShapes, role: LearnerConfig | TeacherConfig, attended: Attended
) -> tuple[int, int]:
    """Bytes for pairs of tokens: what attention keeps in a layer, for all heads, and the masks of all layers.

    Scores are a softmax in float32, and in the role's dtype if that differs. Eager attention keeps them. So
    does sdpa on a GPU without a mask for float32 with fewer key heads than heads: torch 2.13 has no fused
    kernel for it (can_use_mem_efficient_attention in ATen/native/transformers/cuda/sdp_utils.cpp). Under its
    masks, with rows for all query heads of a key head, it has one. Keys and values of joined branches are
    copies, 2eK a token, which eager attention repeats for all heads, 2eQ."""
    e, how, text = DTYPE_BYTES[role.dtype], role.attn_implementation, shapes.text
    unfused = how == "sdpa" and e == 4 and role.num_gpus > 0 and text.key_heads < text.heads
    scored = attended.masked if how == "eager" else attended.causal * unfused
    joined = attended.joined * 2 * e * (text.key + (text.query if how == "eager" else 0))
    rows = text.heads // text.key_heads if how == "sdpa" else 1
    return int(scored * text.heads * (4 if e == 4 else 4 + e) + joined), int(attended.masked * rows * e)


def text_layer_gradients(shapes: ModelShapes, e: int) -> int:
    """Bytes a token beyond what a layer keeps, while its MLP goes backward: 3eI + 2eH."""
    return 3 * e * shapes.text.intermediate + 2 * e * shapes.text.hidden


def text_layer_passing(shapes: ModelShapes, e: int, shards: int = 1) -> int:
    """Bytes a token at the peak of one decoder layer without gradients.

    4eH (embeddings, input, residual, norm), and the larger of attention 4eQ + 2eK and MLP 3eI, which
    tensor parallelism divides."""
    t = shapes.text
    return 4 * e * t.hidden + max(4 * e * t.query + 2 * e * t.key, 3 * e * t.intermediate) // shards


def vision_block_saved(shapes: ModelShapes, e: int) -> int:
    """Bytes a patch that one vision block keeps for its backward pass.

    Qwen3-VL 11eh + 2ei: layer norms 4eh, qkv 3eh, rotated queries and keys 2eh, attention 2eh, MLP 2ei.
    Qwen2.5-VL: norms 2h (4 + 2e), qkv, rotation and attention 7eh, gated MLP 4ei."""
    v = shapes.vision
    if shapes.is_qwen3:
        return e * (11 * v.hidden + 2 * v.intermediate)
    return 2 * v.hidden * (4 + 2 * e) + e * (7 * v.hidden + 4 * v.intermediate)


def vision_block_passing(shapes: ModelShapes, e: int, shards: int = 1) -> int:
    """Bytes a patch at the peak of one vision block without gradients; all but the inputs is divided.

    Input and norm 2eh, Qwen3-VL's float32 position embeddings 4h, and the largest of: rotation in float32
    (qkv 3eh, 16h, and copies 8h in bfloat16), the end of attention 8eh, MLP 2ei (3ei if gated)."""
    v = shapes.vision
    rotation = 3 * e * v.hidden + 16 * v.hidden + (8 * v.hidden if e == 2 else 0)
    mlp = (2 if shapes.is_qwen3 else 3) * e * v.intermediate
    positions = 4 * v.hidden if shapes.is_qwen3 else 0
    return 2 * e * v.hidden + positions + max(rotation, 8 * e * v.hidden, mlp) // shards


def video_bytes(shapes: ModelShapes, e: int, video_tokens: int) -> dict[str, int]:
    """Pixels, float32 and also in the role's dtype if that differs; features e o (1 + D) a video token."""
    v, bytes_a_value = shapes.vision, 4 if e == 4 else 4 + e
    features = video_tokens * v.output * (1 + v.deepstack) * e
    return {"pixels": video_tokens * v.values_a_token * bytes_a_value, "video features": features}


def forward_bytes(
    shapes: ModelShapes, e: int, tokens: int, video_tokens: int, shards: int = 1
) -> dict[str, int]:
    """A pass without gradients: the larger of a language and a vision layer, beside pixels and features."""
    text = tokens * text_layer_passing(shapes, e, shards)
    patches = video_tokens * shapes.vision.patches_a_token
    largest = max(text, patches * vision_block_passing(shapes, e, shards))
    return {"one layer": largest} | video_bytes(shapes, e, video_tokens)
