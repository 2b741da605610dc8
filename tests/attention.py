"""Attention implementations against each other; flash attention by a stand-in for its package's functions."""

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

from video_opd.models import forward
from video_opd.types import EncodedPrompt


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """[B, S, heads, width], as flash_attn.flash_attn_func: a shorter q is the end of k."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    mask = mask if causal else None
    return scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Sequences one after another, [sum of S, heads, width]."""
    ends = ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    split = zip(*(torch.tensor_split(x[None], cu[1:-1].long(), dim=1) for x, cu in ends), strict=True)
    how = dropout_p, softmax_scale, causal
    return torch.cat([flash_attn_func(of_q, of_k, of_v, *how)[0] for of_q, of_k, of_v in split])


def install_stand_in(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """transformers and load_model find flash attention 2 here. Returns the functions called so far."""
    called: set[str] = set()

    def noted(function: Any) -> Any:
        @wraps(function)  # transformers reads the signature
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            called.add(function.__name__)
            return function(*arguments, **options)

        return call

    both = (noted(flash_attn_func), noted(flash_attn_varlen_func))
    functions = (*both, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    matrix = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(matrix, "general_availability_check", lambda: True)
    monkeypatch.setitem(matrix, "supported_devices", ((lambda: True, "cpu"),))
    monkeypatch.setattr(forward, "missing_for", lambda _: None)
    return called


def compare(
    folder: str, encoded: Sequence[EncodedPrompt], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and a gradient of several sequences, two of one prompt, and of one; and greedy answers."""
    called, pad_id = install_stand_in(monkeypatch), encoder.tokenizer.pad_token_id
    asked = [*encoded, encoded[0]]
    responses = [np.arange(5, 5 + 3 * n, 3, dtype=np.int32) for n in range(2, 2 + len(asked))]
    found: dict[str, list[Any]] = {}
    for attention in ("sdpa", "eager", "flash_attention_2"):
        model = forward.load_model(folder, "float32", attention=attention)
        configs = (model.config, model.config.text_config, model.config.vision_config)
        assert {c._attn_implementation for c in configs} == {attention}
        tensors = []
        for n in (1, len(asked)):
            logits = forward.ResponseLogits(model)(forward.collate(asked[:n], responses[:n], pad_id))
            model.zero_grad()
            logits.logsumexp(-1).sum().backward()
            tensors += [logits.detach(), model.get_input_embeddings().weight.grad]
        answers = forward.generate(model, encoded, max_tokens=4, pad_id=pad_id, banned_ids=encoder.pad_ids)
        found[attention] = [tensors, [row.tolist() for (row,) in answers]]
    assert called == {"flash_attn_func", "flash_attn_varlen_func"}
    for tensors, answers in found.values():
        assert answers == found["sdpa"][1]
        for ours, theirs in zip(tensors, found["sdpa"][0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
