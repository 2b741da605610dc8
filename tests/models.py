"""Tiny models of both families, and Qwen2.5-VL's positions by a literal reading."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from demo.models import CHAT_TEMPLATE, SPECIAL, STUDENT, build_model, build_tokenizer

PATCH, MERGE, PER_SECOND = 14, 2, 2


def qwen2_5_model(
    hidden: int, key_heads: int, padded: int = 0, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """With untied embeddings padded by `padded` rows, as the 7B's are."""
    tokenizer = build_tokenizer()
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + padded,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": PER_SECOND,
            "window_size": 56,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=ids["<|endoftext|>"])
    return sharpened(model)


def write_qwen2_5(folder: Path, hidden: int, padded: int, seed: int) -> None:
    """A model folder with untied embeddings padded by `padded` rows, as the 7B's are."""
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    shared: dict[str, Any] = {
        "size": pixels,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    normal: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared, **normal),
        video_processor=Qwen2VLVideoProcessor(**shared, **normal),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    qwen2_5_model(hidden, hidden // 32, padded, seed).save_pretrained(folder)


@torch.no_grad()
def sharpened(model: Any) -> Any:
    """Weights large enough for sharp distributions."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


MODELS = {
    "qwen3_vl": lambda: sharpened(build_model(STUDENT, build_tokenizer(), seed=0)),
    "qwen2_5_vl": lambda: qwen2_5_model(hidden=128, key_heads=2),
}


def literal_positions(types: list[int], grid: tuple[int, int, int], seconds: float) -> list[list[int]]:
    """Qwen2.5-VL's [time, row, column] of every token. Text counts on; video tokens sit on a grid."""
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    positions, i = [], 0
    while i < len(types):
        after = max((max(p) for p in positions), default=-1) + 1
        if types[i] == 0:
            positions.append([after] * 3)
            i += 1
            continue
        for frame in range(t):
            for row in range(h):
                for column in range(w):
                    positions.append([after + int(frame * seconds * PER_SECOND), after + row, after + column])
        i += t * h * w
    return positions
