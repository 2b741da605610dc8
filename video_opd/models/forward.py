"""The forward pass of teacher scoring and learning: logits of response rows only."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from video_opd.config_data import Attention
from video_opd.errors import ConfigError, ModelError
from video_opd.models.attention import missing_for
from video_opd.models.model_files import check_attends_to_all
from video_opd.models.patches import pixel_values
from video_opd.models.qwen_vl import adapt, shorten_last_layer
from video_opd.models.trees import Packing, Tree, packed_places, trees_of
from video_opd.types import EncodedPrompt

VideoLLM = Any
"""A transformers Qwen-VL model; its class is known only from its folder."""

_log = logging.getLogger(__name__)
_TOLD = Event()  # of this process: what _tell_once says

Device = torch.device | str
Head = Callable[[torch.Tensor], torch.Tensor]
RowValues = tuple[torch.Tensor, ...]
RowLoss = Callable[[torch.Tensor, slice], RowValues]
"""Logits float32[rows, V] and their slice of the batch's rows -> tensors of one value per row."""


class Separate(NamedTuple):
    """B sequences, each alone, right-padded to L tokens, on the CPU: their positions are computed from it."""

    input_ids: torch.Tensor  # int64[B, L]
    attention_mask: torch.Tensor  # int64[B, L]
    mm_token_type_ids: torch.Tensor  # int64[B, L]
    video_grid_thw: torch.Tensor  # int64[B, 3]
    second_per_grid_ts: torch.Tensor | None  # float[B], for positions in seconds (Qwen2.5-VL)


@dataclass(frozen=True)
class ResponseBatch:
    """B prompts with their responses, packed into trees of S tokens; models/trees.py.

    R: the response tokens of the batch. C: its clips, in the order of the trees.
    """

    trees: tuple[Tree, ...]
    separate: Separate
    places: torch.Tensor  # int64[S], of the packed tokens among the B x L of `separate`, on the CPU
    input_ids: torch.Tensor  # int64[1, S]
    clips: tuple[int, ...]  # for each clip the first of the B sequences that shows it
    videos: tuple[int, ...]  # the clip of each video among the packed tokens
    pixel_values: torch.Tensor  # float32[patches of the C clips, patch_dim], or empty
    video_grid_thw: torch.Tensor  # int64[C, 3]
    rows: torch.Tensor  # int64[R], packed places of the tokens whose logits predict the response tokens
    targets: torch.Tensor  # int64[R], the response tokens
    lengths: tuple[int, ...]  # response tokens of each of the B sequences
    video_features: Any = None  # the vision tower's output for the clips, if known: learner/vision_cache.py


def clip_of(prompt: EncodedPrompt) -> tuple[Any, ...]:
    """What a model sees of a prompt's clip beside tokens."""
    return prompt.frames_digest, prompt.video_grid_thw, prompt.second_per_grid


def collate(
    prompts: Sequence[EncodedPrompt],
    responses: Sequence[np.ndarray],
    pad_id: int,
    device: Device = "cpu",
    with_pixels: bool = True,
) -> ResponseBatch:
    """Builds the batch. Patches are made on the device, once a clip.

    with_pixels false: none are, since the video features will be given.
    """
    sequences = [np.concatenate(pair) for pair in zip((p.token_ids for p in prompts), responses, strict=True)]
    clips = [clip_of(p) for p in prompts]
    trees = trees_of(sequences, [p.token_types for p in prompts], clips)
    separate = _separate(prompts, sequences, pad_id)
    packed, width = packed_places(trees), separate.input_ids.shape[1]
    places = np.zeros(sum(tree.num_tokens for tree in trees), np.int64)
    for i, of_tokens in enumerate(packed):
        places[of_tokens] = i * width + np.arange(len(of_tokens))
    ends = [(len(p.token_ids) - 1, len(r)) for p, r in zip(prompts, responses, strict=True)]
    rows = [of_tokens[last : last + n] for of_tokens, (last, n) in zip(packed, ends, strict=True)]
    first = {clip: clips.index(clip) for clip in clips}
    shown = [prompts[i] for i in first.values()]
    return ResponseBatch(
        trees=tuple(trees),
        separate=separate,
        places=torch.from_numpy(places),
        input_ids=_to_device(separate.input_ids.flatten()[places][None], device),
        clips=tuple(first.values()),
        videos=_videos(prompts, trees, [list(first).index(clip) for clip in clips]),
        pixel_values=pixel_values(shown, device) if with_pixels else torch.empty(0),
        video_grid_thw=_to_device(torch.tensor([p.video_grid_thw for p in shown]), device),
        rows=_to_device(torch.from_numpy(np.concatenate(rows)), device),
        targets=_to_device(torch.from_numpy(np.concatenate(responses).astype(np.int64)), device),
        lengths=tuple(len(r) for r in responses),
    )


def _videos(prompts: Sequence[EncodedPrompt], trees: Sequence[Tree], clips: Sequence[int]) -> tuple[int, ...]:
    """The clip of each video among the packed tokens; clips: of prompts. A prefix has one, or each branch."""
    shown: list[tuple[int, Any]] = []  # with its times: equal frames, as grey ones, may have others
    for tree in trees:
        shares = np.flatnonzero(prompts[tree.members[0]].token_types)[-1] < tree.prefix
        members = tree.members[:1] if shares else tree.members
        shown += [(clips[i], prompts[i].video_metadata) for i in members]
    videos, most_shown = tuple(clip for clip, _ in shown), max(shown, key=shown.count)
    if shown.count(most_shown) > 1:
        of_clip = [tree for tree in trees if clips[tree.members[0]] == most_shown[0]]
        _tell_once(of_clip, videos.count(most_shown[0]))
    return videos


def _tell_once(trees: Sequence[Tree], num_videos: int) -> None:
    """What sequences of a clip share if it is not the video."""
    if not _TOLD.is_set():
        _TOLD.set()
        separate, computed = (sum(t.num_separate_tokens for t in trees), sum(t.num_tokens for t in trees))
        sequences = sum(len(tree.members) for tree in trees)
        what = f"{sequences} sequences of one clip differ before its video, computed {num_videos} times"
        how = "with prompt.video_first=true only its times come before it"
        _log.warning("%s: they share %d of %d tokens (%s)", what, separate - computed, separate, how)


def _to_device(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """To a GPU from pinned memory, so that the caller does not wait for what the GPU has to do before."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _separate(prompts: Sequence[EncodedPrompt], sequences: Sequence[np.ndarray], pad_id: int) -> Separate:
    """sequences: each prompt with its response."""

    def pad(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
        tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    pairs = zip(prompts, sequences, strict=True)
    seconds = [p.second_per_grid for p in prompts if p.second_per_grid is not None]
    return Separate(
        input_ids=pad(sequences, pad_id),
        attention_mask=pad([np.ones_like(s) for s in sequences], 0),
        mm_token_type_ids=pad([np.pad(p.token_types, (0, len(s) - len(p.token_types))) for p, s in pairs], 0),
        video_grid_thw=torch.tensor([p.video_grid_thw for p in prompts]),
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )


class ResponseLogits(torch.nn.Module):
    """A video LLM whose forward returns the logits of the response rows alone, float32[R, V]."""

    def __init__(self, model: VideoLLM):
        super().__init__()
        self.model: VideoLLM = model
        self._is_short = shorten_last_layer(model)

    def hidden(self, batch: ResponseBatch, cache: Cache | None = None) -> torch.Tensor:
        """The head's input for the response rows, [R, hidden size] in the model's dtype.

        An empty cache gets the keys and values of the packed tokens.
        """
        model, device, dtype = self.model.model, batch.input_ids.device, self.model.dtype
        text = self.model.config.text_config
        groups = text.num_attention_heads // text.num_key_value_heads
        packing = Packing(batch.trees, text._attn_implementation, groups, dtype, device, batch.rows)
        positions, _ = model.get_rope_index(**batch.separate._asdict())
        positions = _to_device(positions.flatten(1)[:, None, batch.places], device)
        features = batch.video_features
        if features is None:
            features = model.get_video_features(batch.pixel_values.to(dtype), batch.video_grid_thw)
        hidden = model(
            input_ids=batch.input_ids,
            attention_mask=torch.empty(1, 1, 1, 1),  # transformers makes no mask of its own beside one of 4-D
            position_ids=positions,
            mm_encoder_outputs={"video": _of_videos(features, batch.videos)},
            past_key_values=cache,
            use_cache=cache is not None,
            packing=packing,
        ).last_hidden_state
        return hidden[0] if self._is_short else hidden[0, batch.rows]

    def forward(self, batch: ResponseBatch) -> torch.Tensor:
        return self.model.lm_head(self.hidden(batch)).float()


def _of_videos(features: Any, videos: Sequence[int]) -> Any:
    """A vision tower's output for clips -> for videos, each of one of the clips."""
    layers = getattr(features, "deepstack_features", None) or []
    chosen = [[of_layer[i] for i in videos] for of_layer in (features.pooler_output, *layers)]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=chosen[0], deepstack_features=chosen[1:])  # pyright: ignore


class ResponseLoss(ResponseLogits):
    """A video LLM whose forward returns a loss per response row, from logits of `chunk` rows at once."""

    def __init__(self, model: VideoLLM, chunk: int):
        super().__init__(model)
        self._chunk = chunk

    def forward(self, batch: ResponseBatch, loss: RowLoss, most_rows: int) -> RowValues:
        return by_chunks(self.model.lm_head, self.hidden(batch), loss, self._chunk, most_rows)


def by_chunks(head: Head, hidden: torch.Tensor, loss: RowLoss, chunk: int, most_rows: int) -> RowValues:
    """loss(head(hidden)), `chunk` rows at a time. The backward pass recomputes the chunks, if several.

    Peak memory is that of one chunk's logits and gradient. `most_rows`: the most rows of any rank. All ranks
    call the head equally often, because under ZeRO-3 each call is a collective.
    """
    rows = [slice(first, first + chunk) for first in range(0, max(most_rows, len(hidden)), chunk)]

    def of(part: torch.Tensor, which: slice) -> RowValues:
        return loss(head(part).float(), which)

    if len(rows) == 1:
        return of(hidden, rows[0])
    parts = [checkpoint(of, hidden[which], which, use_reentrant=False) for which in rows]
    return tuple(torch.cat(of_chunks) for of_chunks in zip(*parts, strict=True))


def load_model(
    path: str, dtype: str, trust_remote_code: bool = False, attention: Attention = "sdpa"
) -> VideoLLM:
    """A transformers video LLM from a folder's safetensors, on the CPU, in `dtype`.

    Raises ConfigError if this machine lacks the package of `attention`; ModelError if weights are missing, or
    if its layers have sliding windows."""
    from transformers import AutoModelForImageTextToText

    if missing := missing_for(attention):
        raise ConfigError(f"attn_implementation={attention} needs {missing} on this node")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would draw them, each rank its own
        why = f"{path} lacks {len(missing)} weights, e.g. {missing[0]}"
        raise ModelError(f"{why}: the model folder is damaged")
    check_attends_to_all(path, model.config.text_config.to_dict())
    adapt(model, attention)
    return model


def load_head(folder: str, dtype: str) -> torch.Tensor:
    """The head [V, H] of a model folder, or the embeddings it is tied to. Raises ModelError."""
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.embed_tokens.weight")
    paths = sorted(Path(folder).glob("*.safetensors"))
    for name in names:
        for path in paths:
            with safe_open(str(path), "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    return tensors.get_tensor(name).to(getattr(torch, dtype))
    raise ModelError(f"{folder} has none of {', '.join(names)}: use a Qwen-VL model folder")


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32[R]: log-softmax of logits[R, V] at targets[R]."""
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """float32[R]: entropy of the distribution of logits[R, V], in nats."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@contextmanager
def without_settings(model: VideoLLM) -> Iterator[None]:
    """Leaves of the model's generation settings, which generate() falls back on, its end tokens alone."""
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = settings


def _taken(layers: list[Any]) -> Iterator[Any]:
    """Each layer of a cache, which then no longer has it."""
    while layers:
        yield layers.pop(0)


def prefilled(model: VideoLLM, batch: ResponseBatch, num_answers: int) -> dict[str, Any]:
    """What generate() of transformers goes on from, in num_answers rows for each of the batch's prompts.

    One packed pass computes all tokens, those that prompts share once. The last one is computed again.
    """
    packed = DynamicCache(config=model.config)
    ResponseLogits(model).hidden(batch, packed)
    separate, device = batch.separate, batch.input_ids.device
    places = [torch.from_numpy(of_tokens) for of_tokens in packed_places(batch.trees)]
    past = pad_sequence([p[:-1] for p in places], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in places], batch_first=True, padding_side="left")
    last = torch.arange(len(places)), torch.tensor([len(p) - 1 for p in places])
    positions, _ = model.model.get_rope_index(**separate._asdict())
    past = past.repeat_interleave(num_answers, 0).to(device)
    layers = _taken(packed.layers)
    states = (tuple(kept[0][:, past].transpose(0, 1) for kept in (x.keys, x.values)) for x in layers)
    return {
        "input_ids": separate.input_ids[last][:, None].repeat_interleave(num_answers, 0).to(device),
        "attention_mask": mask.repeat_interleave(num_answers, 0).to(device),
        "position_ids": positions[:, *last, None].repeat_interleave(num_answers, 1).to(device),
        "past_key_values": DynamicCache(states, model.config),
    }


@torch.inference_mode()
def generate(
    model: VideoLLM,
    prompts: Sequence[EncodedPrompt],
    *,
    max_tokens: int,
    pad_id: int,
    banned_ids: Sequence[int],
    temperature: float = 0.0,
    num_answers: int = 1,
) -> list[list[np.ndarray]]:
    """num_answers responses to each prompt, int32[<= max_tokens], no end token. Temperature 0: greedy.

    What prompts of a clip share is computed once. Of the folder's generation_config.json only the end tokens
    count.
    """
    empty = [np.zeros(0, np.int32)] * len(prompts)
    batch = collate(prompts, empty, pad_id, model.get_input_embeddings().weight.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with without_settings(model):
        output = model.generate(
            **prefilled(model, batch, num_answers),
            max_new_tokens=max_tokens,
            suppress_tokens=list(banned_ids),
            pad_token_id=pad_id,
            **(sampling if temperature else {"do_sample": False}),
        )
    answers = []
    for row in output[:, 1:].cpu().numpy().astype(np.int32):
        stops = np.flatnonzero(np.isin(row, model.generation_config.eos_token_id))  # an id or a list of ids
        answers.append(row[: stops[0]] if len(stops) else row)
    return [answers[i : i + num_answers] for i in range(0, len(answers), num_answers)]
