"""Sequences of one clip that begin alike: what they share is computed once.

A tree is packed as its prefix, the tokens that all its sequences begin with, and then one branch for each
sequence: what it has beside them. A branch attends to the prefix and to itself, at the positions that it has
alone, so that every number is that of separate sequences but for rounding. A sequence alone is a tree too.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

Attend = Callable[..., tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Tree:
    """Sequences that share their first tokens."""

    members: tuple[int, ...]  # places of the sequences
    prefix: int  # shared tokens
    branches: tuple[int, ...]  # tokens of each sequence after them

    @property
    def num_tokens(self) -> int:
        """Computed: the prefix once."""
        return self.prefix + sum(self.branches)

    @property
    def num_separate_tokens(self) -> int:
        """Of the sequences, each alone."""
        return self.prefix * len(self.members) + sum(self.branches)


def trees_of(
    sequences: Sequence[np.ndarray], types: Sequence[np.ndarray], clips: Sequence[Hashable]
) -> list[Tree]:
    """The trees of sequences int32[S], one for each clip, in the order in which clips come first.

    types: of tokens, int32[S], not 0 for those of a video. clips: what a model sees of a clip beside tokens.
    A prefix has a video whole or not at all.
    """
    of_clip = defaultdict(list)
    for place, clip in enumerate(clips):
        of_clip[clip].append(place)
    trees = []
    for members in of_clip.values():
        first = sequences[members[0]]
        prefix = min(_common_length(first, sequences[i]) for i in members)
        video = np.flatnonzero(types[members[0]])
        if len(video) and video[0] < prefix <= video[-1]:
            prefix = int(video[0])
        trees.append(Tree(tuple(members), prefix, tuple(len(sequences[i]) - prefix for i in members)))
    return trees


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are equal."""
    shortest = min(len(a), len(b))
    different = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(different[0]) if len(different) else shortest


def packed_places(trees: Sequence[Tree]) -> list[np.ndarray]:
    """For each sequence of the trees the places of its tokens, int64[S], in the trees packed one by one."""
    places: dict[int, np.ndarray] = {}
    start = 0
    for tree in trees:
        shared = np.arange(start, start + tree.prefix)
        stops = start + tree.prefix + np.cumsum(tree.branches)
        for i, length, stop in zip(tree.members, tree.branches, stops, strict=True):
            places[i] = np.concatenate([shared, np.arange(stop - length, stop)])
        start += tree.num_tokens
    return [places[i] for i in range(len(places))]


class Way(NamedTuple):
    """How the tokens of one tree attend."""

    segments: list[int]  # tokens of the prefix and of each branch; of all, where they attend in one call
    mask: torch.Tensor | None  # [1, 1, S, S], 0 or -inf, without the first rows, which attend causally


class Packing:
    """How tokens of packed trees attend: as costs least. Masks are made once, for all layers."""

    def __init__(self, trees: Sequence[Tree], dtype: torch.dtype, device: torch.device, masked: bool):
        """masked: the attention implementation has no causal kernel of its own."""
        self._dtype, self._device, self._masked = dtype, device, masked
        self.sizes = [tree.num_tokens for tree in trees]
        self.ways = [self._way_of(tree) for tree in trees]

    def _way_of(self, tree: Tree) -> Way:
        """A short prefix is computed again with each branch, each in one causal call of a fused kernel.

        After a long one all branches ask under one mask. Either where it has fewer pairs of tokens.
        """
        prefix, branches = tree.prefix, [n for n in tree.branches if n]
        if self._masked:
            return Way([tree.num_tokens], self._mask(tree))
        if not branches:
            return Way([prefix], None)
        if sum(branches) * tree.num_tokens < sum((prefix + n) ** 2 for n in branches) / 2:
            return Way([prefix, sum(branches)], self._mask(tree)[:, :, prefix:])
        return Way([prefix, *branches], None)

    def _mask(self, tree: Tree) -> torch.Tensor:
        """[1, 1, S, S]: a token sees those before it in the prefix and in its own branch."""
        lengths = torch.tensor([tree.prefix, *tree.branches], device=self._device)
        branch = torch.arange(len(lengths), device=self._device).repeat_interleave(lengths)
        sees = ((branch == 0) | (branch[:, None] == branch)).tril()
        mask = torch.zeros(sees.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~sees, -torch.inf)[None, None]


def attend(
    alone: Attend,
    under_mask: Attend,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    **how: Any,
) -> tuple[torch.Tensor, Any]:
    """transformers' attention `alone`; with a packing, tree by tree. Tensors [B, heads, S, width].

    under_mask: what computes the parts that have a mask.
    """
    if packing is None:
        return alone(module, query, key, value, attention_mask, **how)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return (alone if mask is None else under_mask)(module, q, k, v, mask, **how)[0]

    of_trees = zip(*(states.split(packing.sizes, dim=2) for states in (query, key, value)), strict=True)
    attended = [_attend_tree(call, way, *states) for way, states in zip(packing.ways, of_trees, strict=True)]
    return torch.cat(attended, dim=1), None


def _attend_tree(
    call: Callable[..., torch.Tensor], way: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """[B, S, heads, width]."""
    if len(way.segments) == 1:
        return call(q, k, v, way.mask)
    of_segments = list(zip(*(states.split(way.segments, dim=2) for states in (q, k, v)), strict=True))
    shared, prefix = of_segments[0], way.segments[0]
    if way.mask is not None:
        return torch.cat([call(*shared, None), call(of_segments[1][0], k, v, way.mask)], dim=1)
    joined = [[torch.cat(pair, dim=2) for pair in zip(shared, own, strict=True)] for own in of_segments[1:]]
    first, *others = (call(*states, None) for states in joined)
    return torch.cat([first, *(attended[:, prefix:] for attended in others)], dim=1)


def register() -> None:
    """transformers' attention implementations take a packing from now on."""
    for name in ("sdpa", "flash_attention_2", "flash_attention_3"):
        AttentionInterface.register(
            name, partial(attend, ALL_ATTENTION_FUNCTIONS[name], sdpa_attention_forward)
        )
    AttentionInterface.register("eager", partial(attend, eager_attention_forward, eager_attention_forward))


register()
