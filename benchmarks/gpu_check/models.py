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

from demo.clips import VIDEO_FPS, write_mp4
from demo.models import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from benchmarks.gpu_check.stage import Bench
from preflight.inputs import SHAPES
from video_opd.models.model_files import read_json
from video_opd.config import Config
from video_opd.config_file import load_demo

QWEN3, QWEN2_5 = "Qwen3-VL-8B-Instruct", "Qwen2.5-VL-3B-Instruct"
LAYERS = 4  # of the language model and of the vision tower
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_TEXT |= {"vocab_size": 1024, "num_hidden_layers": 3}
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "depth": 3}
ROPE_SHARES = {"qwen3_vl": (24, 20, 20), "qwen2_5_vl": (16, 24, 24)}  # of time, height, width in 64
QUERY = "the red square is visible " + "From to seconds the " * 24  # longer than a block of the KV cache
PIXEL = 8  # of the picture that is encoded
LR = 1e-3


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    seconds: int  # of a clip
    frame: tuple[int, int]  # height, width
    video_tokens: int  # the budget
    max_model_len: int
    response_tokens: int
    kv_cache_bytes: int
    clips: int = 2

    @property
    def prompts(self) -> int:
        return 2 * self.clips


REAL = Size(36, (360, 640), 8192, 9216, 16, 2 << 30)
TINY = Size(4, (56, 96), 64, 256, 3, 64 << 20, clips=1)


def size_of(bench: Bench) -> Size:
    return TINY if bench.tiny else REAL


def build_folder(bench: Bench) -> None:
    """A model folder with the widths of the published model, LAYERS deep, of random weights."""
    folder = Path(bench.folder) / bench.model
    shapes: dict[str, Any] = read_json(SHAPES / f"{bench.model}.json")
    text, vision = dict(shapes["text_config"]), dict(shapes["vision_config"])
    text["num_hidden_layers"] = vision["depth"] = LAYERS
    if bench.tiny:
        text, vision = text | TINY_TEXT, vision | TINY_VISION
        text |= {"head_dim": 32} if "head_dim" in text else {}
    depth, is_qwen3 = vision["depth"], shapes["model_type"] == "qwen3_vl"
    if is_qwen3:
        vision |= {"deepstack_visual_indexes": list(range(depth - 3, depth))}
    else:
        vision |= {"fullatt_block_indexes": [depth - 1], "tokens_per_second": 2}
    half = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 2
    sections = [share * half // 64 for share in ROPE_SHARES[shapes["model_type"]]]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    rope |= {"mrope_interleaved": True} if is_qwen3 else {}
    tokenizer = build_tokenizer()
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    tied = {"tie_word_embeddings": shapes["tie_word_embeddings"]}
    config = AutoConfig.for_model(
        shapes["model_type"],
        text_config=text | tied | {"rope_parameters": rope, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **tied,
    )
    config.architectures = shapes["architectures"]
    torch.manual_seed(0)
    with torch.device(bench.device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, bench.dtype))
        draw_weights(model, size_of(bench).video_tokens)
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=ids["<|endoftext|>"])
    model.save_pretrained(folder)
    build_processor(tokenizer, is_qwen3, vision["patch_size"]).save_pretrained(folder)
    pad_vocabulary(folder / "tokenizer.json", text["vocab_size"])


@torch.no_grad()
def draw_weights(model: torch.nn.Module, num_tokens: int) -> None:
    """Weights that keep the size of what passes through, so that answers depend on every part.

    Attention over n random tokens averages to 1 / sqrt(n), which its output layer makes up for.
    """
    gains = {"embed_tokens": 2.0, "lm_head": 2.0, "pos_embed": 16.0, "o_proj": math.sqrt(num_tokens) / 4}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
            continue
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        weight.normal_(0.0, gain / math.sqrt(weight[0].numel()))


def pad_vocabulary(path: Path, vocab_size: int) -> None:
    """Gives a tokenizer.json words that no text has, so that every id of a published vocabulary has a text."""
    tokenizer = read_json(path)
    words = tokenizer["model"]["vocab"]
    words |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}  # else they move to its end
    words |= {f"unused{i}": i for i in range(len(words), vocab_size)}
    path.write_text(json.dumps(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast, is_qwen3: bool, patch: int) -> Any:
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (2 * patch) ** 2 * 2**16}
    options: dict[str, Any] = {"size": pixels, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image = Qwen2VLImageProcessor(**options)
    if is_qwen3:
        video = Qwen3VLVideoProcessor(**options, cap_pixels_per_frame=False)
        return Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    video = Qwen2VLVideoProcessor(**options)
    return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)


def write_clips(folder: Path, size: Size) -> None:
    """One split in Charades-STA layout: clips of coloured noise, with two queries each."""
    (folder / "videos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    height, width = (side // PIXEL for side in size.frame)
    lines, lengths = [], ["id,length"]
    for number in range(size.clips):
        pictures = rng.integers(0, 256, (size.seconds * VIDEO_FPS, height, width, 3), dtype=np.uint8)
        write_mp4(folder / "videos" / f"clip{number}.mp4", np.kron(pictures, np.ones((1, PIXEL, PIXEL, 1), np.uint8)))
        lines += [f"clip{number} 0.5 {size.seconds - 0.5}##{QUERY}{end}" for end in ("first", "second")]
        lengths.append(f"clip{number},{size.seconds}")
    (folder / "annotations.txt").write_text("\n".join(lines))
    (folder / "lengths.csv").write_text("\n".join(lengths))


def make_config(bench: Bench, *overrides: str) -> Config:
    """A run on the bench's model as student and teacher, and on its clips."""
    folder, size, num_gpus = Path(bench.folder), size_of(bench), float(bench.device == "cuda")
    engine = {"max_model_len": size.max_model_len, "dtype": bench.dtype, "num_gpus": num_gpus}
    engine |= {"kv_cache_bytes": size.kv_cache_bytes}
    split = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    sections: dict[str, dict[str, Any]] = {
        "data.train": {key: folder / "clips" / path for key, path in split.items()},
        "data.eval": {key: folder / "clips" / path for key, path in split.items()},
        "video": {"max_video_tokens": size.video_tokens, "max_frames": 768, "cache_dir": folder / "frames"},
        "prompt": {"video_first": "true"},
        "rollout": engine | {"max_response_tokens": size.response_tokens, "enforce_eager": not num_gpus},
        "teacher_pool": engine | {"micro_batch": 1},
        "learner": {"dtype": bench.dtype, "num_gpus": num_gpus, "zero_stage": 3, "gradient_checkpointing": True},
    }
    sections["learner"] |= {"freeze_vision": True, "micro_batch": 1, "lr": LR, "warmup_frac": 0}
    sections["rollout"] |= {"max_num_seqs": 8, "prompts_per_call": size.prompts}
    made = [f"{section}.{key}={value}" for section, of in sections.items() for key, value in of.items()]
    model = folder / bench.model
    top = {"student": model, "teacher": model, "runs_dir": folder / "runs", "run_name": "check"}
    top |= {"loss.kind": "opd", "loss.clamp": "null", "groups_per_step": size.prompts, "max_policy_lag": 0}
    return load_demo([*made, *(f"{key}={value}" for key, value in top.items()), *overrides])


class Stage:
    """Builds both."""

    def __init__(self, bench: Bench, _: str):
        self._bench = bench

    def build(self) -> str:
        clips = Path(self._bench.folder) / "clips"
        if not clips.exists():
            write_clips(clips, size_of(self._bench))
        build_folder(self._bench)
        num_bytes = sum(path.stat().st_size for path in (clips.parent / self._bench.model).glob("*.safetensors"))
        return f"{num_bytes / 1e9:.2f} GB of random weights in {self._bench.dtype}"
