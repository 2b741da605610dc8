"""Tiny Qwen3-VL models with their own tokenizer, processor and chat template."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from demo.clips import COLOURS, DURATION_S, SHAPES, SIZE

PATCH, MERGE = 16, 2  # one video token is 32 x 32 pixels of two frames: the whole picture
HEAD_DIM = 32  # the smallest that vLLM runs on a CPU
SPECIAL_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in SPECIAL_NAMES)
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Size:
    """Width and depth of a tiny model."""

    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int = 2


TEACHER = Size(hidden=128, layers=3, vision_hidden=64)
STUDENT = Size(hidden=96, layers=3, vision_hidden=48)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text has ids; every timestamp and every word of the demo is ONE token.

    A tiny model learns grounding only if a timestamp is one token.
    """
    times = [f"{i / 10:.1f}" for i in range(10 * DURATION_S + 1)]
    others = ("the", "is", "visible", "When", "From", "to", "seconds", "user", "assistant", "system")
    words = [*COLOURS, *SHAPES, *others]
    corpus = [f"<{t} seconds> From {t} to {t} seconds." for t in times] + [f"{w} {w}" for w in words] * 20
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\d+\.\d| ?[A-Za-z]+|\d|[^\sA-Za-z\d]|\s+")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"vocab_size": 4096, "min_frequency": 1, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> Qwen3VLProcessor:
    options: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    options |= {"size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE * 256}}
    options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # vLLM uses the image's for videos too
    image = Qwen2VLImageProcessor(**options)
    video = Qwen3VLVideoProcessor(**options, cap_pixels_per_frame=False)
    return Qwen3VLProcessor(image, build_tokenizer(), video, chat_template=CHAT_TEMPLATE)


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """Random weights from `seed`, by transformers' own initialisation."""
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    heads = size.hidden // HEAD_DIM
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": 4 * size.hidden,
        "num_hidden_layers": size.layers,
    }
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD_DIM}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "tie_word_embeddings": True}
    vision = {"hidden_size": size.vision_hidden, "intermediate_size": 2 * size.vision_hidden, "num_heads": 2}
    vision |= {"depth": size.vision_layers, "out_hidden_size": size.hidden, "num_position_embeddings": 64}
    vision |= {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    config = Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config=vision | {"deepstack_visual_indexes": [0]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=ids["<|endoftext|>"])
    return model
