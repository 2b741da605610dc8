"""What each phase of a run computes and reads, by formula: floating-point operations and bytes.

preflight/activations.py explains the letters; M: tokens of a prompt, R: of its response. A multiplication
and an addition are two operations; only matrices and attention count. Attention counts as fused kernels
compute it: half of the pairs of tokens if it is causal, and backward, where it computes scores again, 5 / 2
of its forward pass. tests/preflight/test_time.py compares with torch's count of real modules.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache
from math import ceil, prod

from preflight.adapters import TEXT_LAYER, VISION, adapters
from preflight.memory import PAIR_TOKENS, TEXT_TOKENS, kv_bytes_per_token
from preflight.model_shapes import DTYPE_BYTES, ModelShapes, Parameters, model_bytes, parameters
from preflight.packing import TreeSize, attended
from preflight.zero import trained
from video_opd.config_data import Attention
from video_opd.config_learner import LearnerConfig

BACKWARD_ATTENTION = 2.5
BLOCKS = f"{VISION}blocks."
PATCHES, MERGERS = (BLOCKS, f"{VISION}patch_embed."), (f"{VISION}merger", f"{VISION}deepstack")
LAST_MATRICES = ("mlp.down_proj.weight", "mlp.linear_fc2.weight")  # of a layer: not computed again

Grid = tuple[int, int, int]
"""Frame pairs of a clip, and rows and columns of patches in each."""


@dataclass(frozen=True)
class Sizes:
    """Means over prompts of what their operations depend on."""

    tokens: float  # M
    squared: float  # M^2
    patches: float  # p
    pairs: float  # of patches of one frame pair, over all its frame pairs
    windowed: float  # of patches of one window, where the tower has windows


@dataclass(frozen=True)
class Operations:
    """In products of matrices, and in attention."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.matrices + other.matrices, self.attention + other.attention)

    def __mul__(self, times: float) -> "Operations":
        return Operations(times * self.matrices, times * self.attention)


NOTHING = Operations(0, 0)


def size_of(shapes: ModelShapes, grid: Grid, tokens: int | None = None) -> Sizes:
    """Of one prompt. tokens: M; None: the clip's, its timestamps and an allowance for text."""
    num_pairs, rows, columns = grid
    patches, side = num_pairs * rows * columns, shapes.vision.window
    if tokens is None:
        marks = num_pairs * PAIR_TOKENS[shapes.model_type]
        tokens = patches // shapes.vision.patches_a_token + marks + TEXT_TOKENS
    windowed = num_pairs * _squared_parts(rows, side) * _squared_parts(columns, side) if side else 0
    return Sizes(tokens, tokens**2, patches, num_pairs * (rows * columns) ** 2, windowed)


def mean_size(sizes: Iterable[Sizes]) -> Sizes:
    columns = list(zip(*map(astuple, sizes), strict=True))
    return Sizes(*(sum(column) / len(column) for column in columns))


def _squared_parts(length: int, part: int) -> int:
    """length cut into parts, the last one shorter: the sum of their squares."""
    return length // part * part**2 + (length % part) ** 2


def _numbers(of: Parameters, *prefixes: str) -> int:
    """In the matrices with these prefixes: all but norms and biases, which have one dimension."""
    return sum(prod(s) for n, s in of.items() if len(s) > 1 and n.startswith(prefixes))


@cache
def _all_numbers(shapes: ModelShapes, *prefixes: str) -> int:
    return _numbers(parameters(shapes), *prefixes)


def _vision_matrices(shapes: ModelShapes, of: Parameters, patches: float) -> float:
    """2 operations for each patch and number of the blocks, and for each video token and one of mergers."""
    return 2 * patches * (_numbers(of, *PATCHES) + _numbers(of, *MERGERS) / shapes.vision.patches_a_token)


def vision_forward(shapes: ModelShapes, size: Sizes) -> Operations:
    """Attention 4h for each pair of patches, in a block's own windows or frame pairs."""
    v = shapes.vision
    in_windows = v.depth - v.full_blocks if v.window else 0
    pairs = (v.depth - in_windows) * size.pairs + in_windows * size.windowed
    numbers = _all_numbers(shapes, *PATCHES) + _all_numbers(shapes, *MERGERS) / v.patches_a_token
    return Operations(2 * size.patches * numbers, 4 * v.hidden * pairs)


def text_forward(shapes: ModelShapes, tokens: float, pairs: float) -> Operations:
    """The layers for `tokens` new ones that attend to `pairs` tokens in all: 4Q a pair and layer."""
    matrices = 2 * tokens * _all_numbers(shapes, TEXT_LAYER)
    return Operations(matrices, 4 * shapes.text.query * shapes.text.layers * pairs)


def head_forward(shapes: ModelShapes, rows: float) -> Operations:
    """2HV a row."""
    return Operations(2 * rows * shapes.text.hidden * shapes.text.vocab_size, 0)


def tree_forward(shapes: ModelShapes, size: Sizes, tree: TreeSize, rows: float, how: Attention) -> Operations:
    """A tree of prompts of one clip with their responses, the head on `rows` tokens."""
    text = text_forward(shapes, tree.tokens, _pairs(tree, how))
    return vision_forward(shapes, size) * tree.clips + text + head_forward(shapes, rows)


def _pairs(tree: TreeSize, how: Attention) -> float:
    """That are computed."""
    pairs = attended(tree, how)
    return pairs.causal / 2 + pairs.masked


def update(
    shapes: ModelShapes, learner: LearnerConfig, size: Sizes, tree: TreeSize, response: int
) -> Operations:
    """A tree forward and backward, `response` tokens for each of its members.

    Backward a matrix costs as much as forward for its input's gradient and, if it is trained, as much again.
    With gradient_checkpointing a layer computes forward twice, the second time not its last matrix: nothing
    needs that output. So does the head where a pass has more rows than logit_rows. A frozen tower computes
    forward only."""
    own = trained(shapes, learner)
    added = adapters(shapes, learner) if learner.lora_rank else {}
    tokens, again = tree.tokens, learner.gradient_checkpointing
    text = text_forward(shapes, tokens, _pairs(tree, learner.attn_implementation))
    text += Operations(2 * tokens * _numbers(added, TEXT_LAYER), 0)
    text_again = text + Operations(-2 * tokens * _last_of_layers(shapes, added, TEXT_LAYER), 0)
    total = text + _backward(text, 2 * tokens * _numbers(own, TEXT_LAYER))
    total += text_again if again else NOTHING
    chunked = learner.micro_batch * response > learner.logit_rows
    total += head_forward(shapes, tree.members * response) * (2 + (not learner.lora_rank) + chunked)
    vision = vision_forward(shapes, size) * tree.clips
    if not any(n.startswith(VISION) for n in own):
        return total + vision
    vision += Operations(_vision_matrices(shapes, added, size.patches), 0)
    blocks = _all_numbers(shapes, BLOCKS) - _last_of_layers(shapes, added, BLOCKS)
    vision_again = Operations(2 * size.patches * blocks, vision.attention)
    of_weights = _vision_matrices(shapes, own, size.patches)
    return total + vision + _backward(vision, of_weights) + (vision_again if again else NOTHING)


def _backward(forward: Operations, of_weights: float) -> Operations:
    return Operations(forward.matrices + of_weights, BACKWARD_ATTENTION * forward.attention)


def _last_of_layers(shapes: ModelShapes, added: Parameters, prefix: str) -> int:
    """Numbers in the last matrices, but those with adapters, whose inputs come after them."""
    adapted = {n.replace(".lora", ".weight") for n in added}
    last = {n: s for n, s in parameters(shapes).items() if n.endswith(LAST_MATRICES) and n not in adapted}
    return _numbers(last, prefix)


def decode_bytes(
    shapes: ModelShapes, dtype: str, shards: int, size: Sizes, responses: tuple[int, int], at_once: int
) -> float:
    """What a shard reads while its engine decodes `responses` (their number, R), `at_once` together.

    For each token of a batch the weights of layers and head once; for each token of a response the keys and
    values of what is before it, (M + R / 2) kv_bytes_per_token."""
    number, length = responses
    weights = model_bytes(shapes, DTYPE_BYTES[dtype], TEXT_LAYER)
    weights += DTYPE_BYTES[dtype] * shapes.text.hidden * shapes.text.vocab_size
    keys = (size.tokens + length / 2) * kv_bytes_per_token(shapes, dtype, shards)
    return length * (ceil(number / at_once) * weights / shards + number * keys)


def shard_bytes(shapes: ModelShapes, dtype: str, shards: int, tokens: float) -> float:
    """What a shard sends: two sums over the shards in each layer, 2 (shards - 1) / shards of e H a token."""
    a_sum = 2 * (shards - 1) / shards * tokens * shapes.text.hidden * DTYPE_BYTES[dtype]
    return 2 * shapes.text.layers * a_sum
