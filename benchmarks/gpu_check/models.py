"""What the check runs on: models of random weights at published widths, clips that fill the video budget."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from benchmarks.gpu_check.part import Bench
from demo.clips import SPLIT_FILES, VIDEO_FPS, write_mp4
from demo.models import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from preflight.inputs import SHAPES
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.model_files import read_json

LAYERS = {"text": 4, "vision": 4}
ROPE_PARTS = {"qwen3_vl": (24, 20, 20), "qwen2_5_vl": (16, 24, 24)}  # of time, height and width, of 64
TINY_LAYERS = {"text": 3, "vision": 3}
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_TEXT |= {"vocab_size": 1024}
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
TINY_HEAD_DIM = 32  # the smallest that vLLM runs on a CPU
QUERY = "the red square is visible " + "From to seconds the " * 24  # longer than a block of a KV cache
PIXEL = 8  # a square of the clips' noise
MAX_POSITIONS = 32768
TEMPERATURE = 0.9  # of the policy: all that divides logits, or bans ids, takes part
LR = 1e-3  # a step that is seen in bfloat16


@dataclass(frozen=True)
class Size:
    """How large everything is but the model."""

    clip_s: int
    frame: tuple[int, int]  # height, width
    num_clips: int  # with two prompts each
    video_tokens: int  # the budget of a clip
    max_model_len: int
    response_tokens: int
    kv_cache_bytes: int


REAL = Size(36, (360, 640), 2, 8192, 9216, 16, 2 << 30)
TINY = Size(4, (56, 96), 1, 64, 384, 3, 64 << 20)


def size_of(bench: Bench) -> Size:
    return TINY if bench.tiny else REAL


class Checks:
    """Prepares the other parts."""

    def __init__(self, bench: Bench, _: str):
        self._bench = bench

    def build(self) -> str:
        """Writes the model, and the clips if they are not there."""
        folder = Path(self._bench.folder)
        if not (folder / "clips").exists():
            write_clips(folder / "clips", size_of(self._bench))
        build_model(self._bench, folder / self._bench.model)
        num_bytes = sum(path.stat().st_size for path in (folder / self._bench.model).glob("*.safetensors"))
        return f"{num_bytes / 1e9:.2f} GB of random weights in {self._bench.dtype}"


def build_model(bench: Bench, folder: Path) -> None:
    """A model folder: random weights, the published widths, a few layers, the demo's tokenizer."""
    config = write_model_files(bench, folder)
    model = draw_model(bench, config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


def write_model_files(bench: Bench, folder: Path, whole: bool = False) -> Any:
    """All of a model folder but weights; whole: of the published depth. Returns transformers' config."""
    shapes, tokenizer = read_json(SHAPES / f"{bench.model}.json"), build_tokenizer()
    tokenizer.model_max_length = MAX_POSITIONS
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    config = model_config(shapes, bench.tiny, ids, whole)
    config.save_pretrained(folder)
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    GenerationConfig(eos_token_id=end, pad_token_id=ids["<|endoftext|>"]).save_pretrained(folder)
    build_processor(shapes, tokenizer).save_pretrained(folder)
    pad_vocabulary(folder / "tokenizer.json", config.text_config.vocab_size)
    return config


def draw_model(bench: Bench, config: Any, **how: Any) -> Any:
    """The model with random weights, on the bench's device. how: for transformers' from_config."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, bench.dtype), **how)
        draw_weights(model, size_of(bench).video_tokens)
    return model


def model_config(shapes: dict[str, Any], tiny: bool, ids: dict[str, int], whole: bool = False) -> Any:
    """transformers' config of a model with the widths of `shapes`, a file of configs/shapes."""
    kind, layers = shapes["model_type"], TINY_LAYERS if tiny else LAYERS
    text, vision = shapes["text_config"], shapes["vision_config"]
    if not whole:
        text = text | {"num_hidden_layers": layers["text"]}
        vision = vision | {"depth": layers["vision"]}
    if tiny:
        text, vision = text | TINY_TEXT, vision | TINY_VISION
        text |= {"head_dim": TINY_HEAD_DIM} if "head_dim" in text else {}
    if kind == "qwen2_5_vl":
        vision = vision | {"tokens_per_second": 2}
    if not whole:
        last = {"qwen3_vl": ("deepstack_visual_indexes", 3), "qwen2_5_vl": ("fullatt_block_indexes", 1)}[kind]
        vision[last[0]] = list(range(layers["vision"]))[-last[1] :]
    half = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 2
    rope = {"rope_type": "default", "rope_theta": 1e6}
    rope |= {"mrope_section": [part * half // 64 for part in ROPE_PARTS[kind]]}
    rope |= {"mrope_interleaved": True} if kind == "qwen3_vl" else {}
    text |= {"rope_parameters": rope, "max_position_embeddings": MAX_POSITIONS}
    tied = {"tie_word_embeddings": shapes["tie_word_embeddings"]}
    config = AutoConfig.for_model(
        kind,
        text_config=text | tied | {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **tied,
    )
    config.architectures = shapes["architectures"]
    return config


@torch.no_grad()
def draw_weights(model: torch.nn.Module, num_tokens: int) -> None:
    """Weights that keep the size of what passes through, so that answers depend on every part.

    Attention over n tokens averages random values to 1 / sqrt(n), which its output layer makes up for.
    """
    gains = {"embed_tokens": 2.0, "lm_head": 2.0, "pos_embed": 16.0, "o_proj": math.sqrt(num_tokens) / 4}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
            continue
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        weight.normal_(0.0, gain / math.sqrt(weight[0].numel()))


def build_processor(shapes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """A processor that resizes nothing, with one normalisation: vLLM uses the image's for videos too."""
    patch = shapes["vision_config"]["patch_size"]
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (2 * patch) ** 2 * 2**16}
    options: dict[str, Any] = {"size": pixels, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image = Qwen2VLImageProcessor(**options)
    if shapes["model_type"] == "qwen3_vl":
        video = Qwen3VLVideoProcessor(**options, cap_pixels_per_frame=False)
        return Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    video = Qwen2VLVideoProcessor(**options)
    return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)


def pad_vocabulary(path: Path, vocab_size: int) -> None:
    """Gives a tokenizer.json words that no text has, so that every id of the model has a text."""
    tokenizer = read_json(path)
    words = tokenizer["model"]["vocab"]
    words |= {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }  # else they move to its end
    words |= {f"unused{i}": i for i in range(len(words), vocab_size)}
    path.write_text(json.dumps(tokenizer))


def write_clips(folder: Path, size: Size) -> None:
    """A split in Charades-STA layout: clips of coloured noise, with two queries each."""
    (folder / "videos").mkdir(parents=True)
    rng, squares = np.random.default_rng(0), np.ones((1, PIXEL, PIXEL, 1), np.uint8)
    height, width = (side // PIXEL for side in size.frame)
    lines, lengths = [], ["id,length"]
    for number in range(size.num_clips):
        noise = rng.integers(0, 256, (size.clip_s * VIDEO_FPS, height, width, 3), dtype=np.uint8)
        write_mp4(folder / "videos" / f"clip{number}.mp4", np.kron(noise, squares))
        lines += [f"clip{number} 0.5 {size.clip_s - 0.5}##{QUERY}{end}" for end in ("first", "second")]
        lengths.append(f"clip{number},{size.clip_s}")
    (folder / SPLIT_FILES["annotations"]).write_text("\n".join(lines))
    (folder / SPLIT_FILES["lengths"]).write_text("\n".join(lengths))


def make_config(bench: Bench, *overrides: str) -> Config:
    """A run with the bench's model as student and teacher, on its clips."""
    folder, size, num_gpus = Path(bench.folder), size_of(bench), int(bench.device == "cuda")
    engine = {"max_model_len": size.max_model_len, "dtype": bench.dtype, "num_gpus": num_gpus}
    engine |= {"kv_cache_bytes": size.kv_cache_bytes}
    data = {key: folder / "clips" / name for key, name in SPLIT_FILES.items()}
    num_prompts = 2 * size.num_clips
    sections: dict[str, dict[str, Any]] = {
        "data.train": data,
        "data.eval": data,
        "video": {"max_video_tokens": size.video_tokens, "max_frames": 768, "cache_dir": folder / "frames"},
        "prompt": {"video_first": True},
        "rollout": engine | {"max_response_tokens": size.response_tokens, "enforce_eager": not num_gpus},
        "teacher_pool": engine | {"micro_batch": 1},
        "learner": {"dtype": bench.dtype, "num_gpus": num_gpus, "zero_stage": 3, "micro_batch": 1, "lr": LR},
        "loss": {"kind": "opd", "clamp": "null"},
    }
    sections["rollout"] |= {"max_num_seqs": 8, "prompts_per_call": num_prompts, "temperature": TEMPERATURE}
    sections["learner"] |= {"gradient_checkpointing": True, "freeze_vision": True, "warmup_frac": 0}
    made = [f"{section}.{key}={value}" for section, of in sections.items() for key, value in of.items()]
    model = folder / bench.model
    top = {"student": model, "teacher": model, "runs_dir": folder / "runs", "run_name": "gpu_check"}
    top |= {"groups_per_step": num_prompts, "max_policy_lag": 0}
    return load_demo([*made, *(f"{key}={value}" for key, value in top.items()), *overrides])
