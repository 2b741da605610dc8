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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

from video_opd.models.merged_attention import branch_attention, is_fused

Attend = Callable[..., tuple[torch.Tensor, Any]]
MASK_ALIGNMENT = 8  # numbers; torch would copy a mask with other rows for each call of CUDA's kernels


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
    """The trees of sequences int32[S], in the order in which their clips come first.

    types: of tokens, int32[S], not 0 for those of a video. clips: what a model sees of a clip beside tokens.
    A prefix has a video whole or not at all. Sequences of a clip are one tree, unless what precedes their
    videos differs and there are fewer tokens if those that share their video are trees of their own.
    """
    videos = [_extent(of_sequence) for of_sequence in types]
    trees = []
    for members in _grouped(range(len(sequences)), clips):
        whole = _tree_of(members, sequences, videos)
        if whole.prefix >= videos[members[0]].stop:
            trees.append(whole)
            continue
        starts = [sequences[i][: videos[i].stop].tobytes() for i in members]
        apart = [_tree_of(some, sequences, videos) for some in _grouped(members, starts)]
        trees += min([whole], apart, key=lambda found: sum(tree.num_tokens for tree in found))
    return trees


def _extent(types: np.ndarray) -> slice:
    """From the first to the last token of the video; nothing without one."""
    video = np.flatnonzero(types)
    return slice(int(video[0]), int(video[-1]) + 1) if len(video) else slice(0, 0)


def _grouped(places: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
    """Places with equal keys together."""
    groups = defaultdict(list)
    for place, key in zip(places, keys, strict=True):
        groups[key].append(place)
    return list(groups.values())


def _tree_of(members: Sequence[int], sequences: Sequence[np.ndarray], videos: Sequence[slice]) -> Tree:
    first, video = sequences[members[0]], videos[members[0]]
    prefix = min(_common_length(first, sequences[i]) for i in members)
    prefix = video.start if video.start < prefix < video.stop else prefix
    return Tree(tuple(members), prefix, tuple(len(sequences[i]) - prefix for i in members))


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


class Call(NamedTuple):
    """How the tokens of one segment attend: to those before them in it, and to a prefix."""

    prefix: int | None  # place of the segment that is its prefix
    mask: torch.Tensor | None  # [1, 1, rows, tokens of prefix and segment], 0 or -inf; None: the kernel knows
    branches: tuple[int, ...] = ()  # the segment is all of these, without masks: see merged_attention.py


class Packing:
    """Which tokens of packed trees attend to which: made once, for all layers.

    Segments are prefixes and branches. A branch asks its prefix and itself, with keys and values side by
    side, at once: as many pairs of tokens as needed, and masks that grow with the branches alone. sdpa on a
    GPU in half precision needs neither: there the branches of a tree are one segment.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        attention: str,
        groups: int,
        dtype: torch.dtype,
        device: Any,
        rows: torch.Tensor | None = None,
    ):
        """attention: transformers' name. groups: query heads of a key head.

        rows: int64[R], the tokens whose states are wanted in the end; None: all. See qwen_vl.last_layer.
        """
        self.rows = rows
        self._attention, self._groups, self._dtype, self._device = attention, groups, dtype, device
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self.sizes: list[int] = []  # tokens of the segments
        self.calls: list[Call] = []
        for tree in trees:
            branches = [length for length in tree.branches if length]
            if len(branches) < 2:
                self._add(tree.num_tokens)
                continue
            prefix = self._add(tree.prefix) if tree.prefix else None
            if prefix is not None and attention == "sdpa" and is_fused(device, dtype):
                self.sizes.append(sum(branches))
                self.calls.append(Call(prefix, None, tuple(branches)))
                continue
            for length in branches:
                self._add(length, prefix)

    def _add(self, length: int, prefix: int | None = None) -> int:
        """A segment; returns its place."""
        before = 0 if prefix is None else self.sizes[prefix]
        self.sizes.append(length)
        self.calls.append(Call(prefix, self._mask(before, length)))
        return len(self.sizes) - 1

    def _mask(self, before: int, length: int) -> torch.Tensor | None:
        """Kernels are causal themselves, flash attention's for the last of the tokens too; eager is not."""
        if self._attention.startswith("flash") or (self._attention == "sdpa" and not before):
            return None
        if (before, length) not in self._masks:
            width = before + length
            aligned = -(-width // MASK_ALIGNMENT) * MASK_ALIGNMENT
            hidden = torch.full((length, aligned), -torch.inf, dtype=self._dtype, device=self._device)
            rows = hidden.triu_(before + 1).repeat(self._groups if self._attention == "sdpa" else 1, 1)
            self._masks[before, length] = rows[None, None, :, :width]
        return self._masks[before, length]


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
    """transformers' attention `alone`; with a packing, segment by segment. Tensors [B, heads, S, width].

    under_mask: what computes the segments that have a mask.
    """
    if packing is None:
        return alone(module, query, key, value, attention_mask, **how)
    queries, keys, values = (states.split(packing.sizes, dim=2) for states in (query, key, value))
    attended = []
    for q, k, v, (prefix, mask, branches) in zip(queries, keys, values, packing.calls, strict=True):
        if prefix is not None and branches:
            assert not how.get("dropout"), "merged attention has no dropout: set attention_dropout to 0"
            of_prefix = keys[prefix], values[prefix]
            attended.append(branch_attention(q, of_prefix, k, v, branches, how["scaling"]).transpose(1, 2))
            continue
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        function = alone if mask is None else under_mask
        attended.append(function(module, q, k, v, mask, **how)[0])
    return torch.cat(attended, dim=1), None


def _sdpa_under_mask(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query heads of a key head are rows of one: transformers would repeat keys and values for each."""
    groups = query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)
    attended = scaled_dot_product_attention(rows, key, value, mask, dropout, scale=scaling)
    return attended.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2), None


def register() -> None:
    """transformers' attention implementations take a packing from now on."""
    for name in ("flash_attention_2", "flash_attention_3"):
        flash = ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(name, partial(attend, flash, flash))
    AttentionInterface.register("sdpa", partial(attend, sdpa_attention_forward, _sdpa_under_mask))
    # that of both families, where it is no entry of the interface but a function of each model's file
    AttentionInterface.register("eager", partial(attend, eager_attention_forward, eager_attention_forward))


register()
