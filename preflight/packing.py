"""Packed trees of sequences by their numbers of tokens: how they attend, and the most that a pass holds.

video_opd/models/trees.py computes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

from video_opd.config_data import Attention


@dataclass(frozen=True)
class TreeSize:
    """A tree by its tokens. Numbers may be means over trees."""

    prefix: float
    prefix_squared: float
    members: float  # sequences, each a branch
    branches: float  # tokens of all branches
    branches_squared: float  # of each branch, added

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
    joined: float = 0.0  # tokens, not pairs: of branches that are each joined to a copy of the prefix

    def __add__(self, other: "Attended") -> "Attended":
        masked, joined = self.masked + other.masked, self.joined + other.joined
        return Attended(self.causal + other.causal, masked, joined)


NO_PAIRS = Attended(0)


def attended(tree: TreeSize, attention: Attention) -> Attended:
    """The rule of Packing in video_opd/models/trees.py."""
    everything = tree.tokens**2 - tree.prefix**2 + tree.prefix_squared
    if attention == "eager":
        return Attended(0, everything)
    alone = tree.members * tree.prefix_squared + 2 * tree.prefix * tree.branches + tree.branches_squared
    if tree.members <= 1 or not tree.branches:
        return Attended(alone if tree.members <= 1 else tree.prefix_squared)
    if tree.branches * tree.tokens < alone / 2:
        return Attended(tree.prefix_squared, tree.branches * tree.tokens)
    return Attended(alone, 0, tree.separate)


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

    video_tokens: of the longest clip. most_tokens: of a pass, packed; one sequence may have more.
    A tree of b branches is joined where its prefix is at most sqrt(2b - 1) times a branch, and so has at most
    b (1 + sqrt(2b - 1)) / (b + sqrt(2b - 1)) times its packed tokens. Else it has fewer pairs under its mask
    than b longest^2 / 2."""
    tokens = min(sequences * longest, max(most_tokens or sequences * longest, longest))
    videos = min(sequences * video_tokens, tokens)
    if attention == "eager":
        return Pass(tokens, videos, Attended(0, tokens**2))
    if sequences == 1:
        return Pass(tokens, videos, Attended(tokens**2))
    most = sqrt(2 * sequences - 1)
    joined = min(sequences * longest, tokens * sequences * (1 + most) / (sequences + most))
    return Pass(
        tokens, videos, Attended(joined * longest, min(tokens**2, sequences * longest**2 / 2), joined)
    )
