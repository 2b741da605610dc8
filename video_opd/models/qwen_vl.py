"""Parts of transformers' Qwen-VL models in another form: positions, the tower's attention, the last layer."""

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

VideoLLM = Any
Positions = tuple[torch.Tensor, torch.Tensor]


def adapt(model: VideoLLM, attention: str) -> None:
    """Replaces transformers' own functions: one that is wrong, and three that are slow."""
    positions = {"qwen2_5_vl": qwen2_5_positions, "qwen3_vl": qwen3_positions}.get(model.config.model_type)
    if positions is None:
        return
    model.model.get_rope_index = MethodType(positions, model.model)
    projection = model.model.visual.patch_embed.proj
    projection.forward = MethodType(project, projection)
    if attention == "sdpa":
        for block in model.model.visual.blocks:
            block.attn.forward = MethodType(attend, block.attn)


def qwen2_5_positions(
    model: VideoLLM,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    video_grid_thw: torch.Tensor,
    second_per_grid_ts: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_grid_thw: None = None,
    **_: Any,
) -> Positions:
    """Qwen2.5-VL's 3-D positions as trained, int64[3, B, S], and how far they exceed the length, [B, 1].

    One video a sequence. Text continues after the video's LARGEST position, as in the model's own code and
    vLLM; transformers 5.19 continues after height and width, so that text and later frames share positions.
    """
    assert image_grid_thw is None
    vision = model.config.vision_config
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.zeros((3, *input_ids.shape), dtype=torch.int64)
    ahead = []
    for b, (t, height, width) in enumerate(video_grid_thw.tolist()):
        valid = mask[b].cpu().bool()
        video = (mm_token_type_ids[b].cpu()[valid] != 0).nonzero()[:, 0]
        first, last, length = int(video[0]), int(video[-1]), int(valid.sum())
        h, w = height // vision.spatial_merge_size, width // vision.spatial_merge_size
        inside = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
        inside[0] = (inside[0] * (float(second_per_grid_ts[b]) * vision.tokens_per_second)).long()
        inside = inside + first
        after = torch.arange(length - last - 1) + inside.max() + 1
        of_row = torch.cat([torch.arange(first).expand(3, -1), inside, after.expand(3, -1)], dim=1)
        positions[:, b, valid] = of_row
        ahead.append(int(of_row.max()) + 1 - length)
    return positions.to(input_ids.device), torch.tensor(ahead, device=input_ids.device)[:, None]


def qwen3_positions(
    model: VideoLLM,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    video_grid_thw: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_grid_thw: None = None,
    **_: Any,
) -> Positions:
    """Qwen3-VL's 3-D positions, int64[3, B, S], and how far they exceed the length, [B, 1].

    One video a sequence. As transformers' own, which reads each sequence on the host, frame by frame.
    """
    assert image_grid_thw is None
    rows, columns = (video_grid_thw[:, 1:] // model.config.vision_config.spatial_merge_size).T[..., None]
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    is_video = (mm_token_type_ids != 0) & (valid != 0)
    place = (is_video.cumsum(1) - 1) % (rows * columns)  # of a video token in its frame
    is_last = place == rows * columns - 1
    step = torch.where(is_video, is_last * torch.maximum(rows, columns), valid)
    first = step.cumsum(1) - step  # text: its position; a video token: where its frame begins
    inside = is_video * torch.stack([torch.zeros_like(place), place // columns, place % columns])
    positions = (first + inside) * valid
    return positions, positions.amax((0, 2))[:, None] + 1 - valid.sum(1, keepdim=True)


def project(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """The tower's first layer, [N, out, 1, 1, 1] of patches as large as its kernel, as one matrix product."""
    weight = convolution.weight.flatten(1)
    return linear(patches.flatten(1), weight, convolution.bias)[..., None, None, None]


def attend(
    attention: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any, **_: Any
) -> torch.Tensor:
    """The tower's attention inside frames or windows, [patches, hidden size]: all of one length at once.

    As transformers' own, which calls the kernel for each of them. cu_seqlens: where each begins, and the end.
    """
    query, key, value = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)

    def inside(which: slice | torch.Tensor, length: int) -> torch.Tensor:
        """Of patches [n * length], [n * length, hidden size]."""
        q, k, v = (s[which].unflatten(0, (-1, length)).transpose(1, 2) for s in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        return attended.transpose(1, 2).flatten(0, 1).flatten(1)

    lengths = cu_seqlens.diff()
    different = lengths.unique().tolist()
    if len(different) == 1:
        return attention.proj(inside(slice(None), different[0]))
    offsets = [torch.arange(length, device=cu_seqlens.device) for length in different]
    of_length = [(cu_seqlens[:-1][lengths == len(o), None] + o).flatten() for o in offsets]
    attended = torch.cat([inside(*part) for part in zip(of_length, different, strict=True)])
    return attention.proj(attended[torch.cat(of_length).argsort()])


def shorten_last_layer(model: VideoLLM) -> bool:
    """Makes the last decoder layer return the states of `packing.rows` alone, in passes with a packing.

    False: it stays, in a model so shallow that features of the tower are added behind that layer.
    """
    layers, vision = model.model.language_model.layers, model.config.vision_config
    if len(getattr(vision, "deepstack_visual_indexes", ())) >= len(layers):
        return False
    layers[-1].forward = MethodType(last_layer, layers[-1])
    return True


def last_layer(layer: Any, hidden_states: torch.Tensor, packing: Any = None, **how: Any) -> torch.Tensor:
    """As transformers' own, [B, S, H]; with a packing of its rows, [1, R, H]: nothing attends to others."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), packing=packing, **how)
    hidden_states = hidden_states + attended
    if packing is not None and packing.rows is not None:
        hidden_states = hidden_states[:, packing.rows]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
