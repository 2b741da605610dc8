"""Packed trees of sequences by their numbers of tokens: how they attend, and the most that a pass holds.

video_opd/models/trees.py computes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from video_opd.config_data import Attention


@dataclass(frozen=True)
class TreeSize:
    """A tree by its tokens. Numbers may be means over trees."""

    prefix: float
    prefix_squared: float
    members: float  # sequences, each a branch
    branches: float  # tokens of all branches
    branches_squared: float  # of each branch, added
    clips: float = 1.0  # passes of the vision tower; less than 1 if other trees of a pass show its clip

    @property
    def tokens(self) -> float:
        """Computed: the prefix once."""
        return self.prefix + self.branches

    @property
    def separate(self) -> float:
        """Tokens of the sequences, each alone."""
        return self.prefix * self.members + self.branches


@dataclass(frozen=True)
class Attended:
    """How tokens attend in one layer: pairs of tokens in calls of attention."""

    causal: float  # without a mask: a kernel computes half of them
    masked: float = 0.0  # under a mask: all are computed
    joined: float = 0.0  # tokens, not pairs: of branches and the copies of the prefix beside them

    def __add__(self, other: "Attended") -> "Attended":
        masked, joined = self.masked + other.masked, self.joined + other.joined
        return Attended(self.causal + other.causal, masked, joined)


NO_PAIRS = Attended(0)


def attended(tree: TreeSize, attention: Attention) -> Attended:
    """As Packing in video_opd/models/trees.py lets them: a branch asks its prefix and itself at once."""
    if tree.members <= 1:
        alone = tree.prefix_squared + 2 * tree.prefix * tree.branches + tree.branches_squared
        return Attended(0, alone) if attention == "eager" else Attended(alone)
    asked, joined = tree.prefix * tree.branches, tree.separate if tree.prefix else 0
    if attention == "eager":
        return Attended(0, tree.prefix_squared + asked + tree.branches_squared, joined)
    if attention == "sdpa" and tree.prefix:
        return Attended(tree.prefix_squared, asked + tree.branches_squared, joined)
    return Attended(tree.prefix_squared + 2 * asked + tree.branches_squared, 0, joined)


@dataclass(frozen=True)
class Pass:
    """What the memory of one pass depends on."""

    tokens: int  # packed
    video_tokens: int  # of its clips
    attended: Attended


def pass_of(trees: Iterable[TreeSize], video_tokens: int, attention: Attention) -> Pass:
    """The pass over these trees."""
    trees = list(trees)
    pairs = sum((attended(tree, attention) for tree in trees), NO_PAIRS)
    return Pass(int(sum(tree.tokens for tree in trees)), video_tokens, pairs)


def largest_pass(
    sequences: int, longest: int, video_tokens: int, attention: Attention, most_tokens: int | None = None
) -> Pass:
    """Bounds of every pass of so many sequences, the longest of `longest` tokens, whatever they share.

    video_tokens: of the longest clip. most_tokens: of a pass, packed; one sequence may have more. No token is
    in more pairs than the longest sequence has tokens, and no branch has more tokens with its prefix."""
    tokens = min(sequences * longest, max(most_tokens or sequences * longest, longest))
    videos, pairs = min(sequences * video_tokens, tokens), tokens * longest
    joined = sequences * longest if sequences > 1 else 0
    if attention == "eager":
        return Pass(tokens, videos, Attended(0, pairs, joined))
    if attention == "sdpa":
        return Pass(tokens, videos, Attended(pairs, pairs if joined else 0, joined))
    return Pass(tokens, videos, Attended(2 * pairs, 0, joined))
