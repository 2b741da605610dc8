"""The formulas of preflight/time.py against torch's count of real modules' operations, and bytes by hand."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, vision_utils

from learner.adapters import checkpoint_layers, choose_trained
from preflight import time
from preflight.inputs import SHAPES
from preflight.model_shapes import ModelShapes, parse_shapes
from preflight.packing import TreeSize
from preflight.time import Grid, Operations, Sizes
from video_opd.config_learner import LearnerConfig
from video_opd.models import trees
from video_opd.models.forward import by_chunks, token_logprobs
from video_opd.models.trees import Packing, Tree

GRIDS = [(3, 20, 20), (2, 10, 30)]  # neither divides into Qwen2.5-VL's windows of 8 patches
TEXT, RESPONSE = 200, 40
WITHIN = 0.05
meta = {"device": "meta", "dtype": torch.bfloat16}


@dataclass
class Real:
    """transformers' model of a committed shape, a few layers deep, on the meta device."""

    model: Any
    shapes: ModelShapes

    def see(self, grids: list[Grid]) -> torch.Tensor:
        """The features of clips, [video tokens, H], deepstack's added."""
        vision, grid = self.model.config.vision_config, torch.tensor(grids)
        lengths, longest = vision_utils.get_vision_attention_seqlens(grid, vision)
        known = {"cu_seqlens": lengths, "max_seqlen": longest}
        known["position_ids"] = vision_utils.get_vision_position_ids(grid, vision.spatial_merge_size)
        if self.shapes.is_qwen3:
            side = {"num_grid_per_side": 48, "mode": "bilinear", "align_corners": True}
            made = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, spatial_merge_size=2, **side
            )
            known |= dict(zip(("interp_indices", "interp_weights"), made, strict=True))
        else:
            made = vision_utils.get_vision_window_index(grid, 2, vision.window_size, vision.patch_size)
            known |= {"window_index": made[0], "cu_window_seqlens": made[1]}
        on_host = ("cu_seqlens", "cu_window_seqlens")  # read as numbers
        known = {k: v.to("meta") if hasattr(v, "to") and k not in on_host else v for k, v in known.items()}
        values = self.shapes.vision.values_a_token // self.shapes.vision.patches_a_token
        pixels = torch.empty(int(grid.prod(1).sum()), values, **meta)
        out = self.model.model.visual(pixels, grid_thw=grid, **known)
        return torch.stack([out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]).sum(0)

    def read(self, features: torch.Tensor, tokens: int = TEXT + RESPONSE, **how: Any) -> torch.Tensor:
        """Hidden states [1, S, H] of a clip and tokens after it."""
        ids = torch.zeros(tokens, dtype=torch.int64, device="meta")
        embedded = torch.cat([features, self.model.get_input_embeddings()(ids)])[None]
        positions = torch.zeros(3, 1, embedded.shape[1], dtype=torch.int64, device="meta")
        language = self.model.model.language_model
        given = {"inputs_embeds": embedded, "position_ids": positions, "use_cache": False}
        return language(**given, **how).last_hidden_state


@pytest.fixture(params=["Qwen3-VL-8B-Instruct", "Qwen2.5-VL-7B-Instruct"])
def real(request, tmp_path, monkeypatch) -> Real:
    tree = json.loads((SHAPES / f"{request.param}.json").read_text())
    tree["text_config"]["num_hidden_layers"], tree["vision_config"]["depth"] = 3, 3
    few = {"deepstack_visual_indexes": [0, 2], "fullatt_block_indexes": [1, 9]}
    kind, own = tree["model_type"], {"qwen3_vl": "deepstack_visual_indexes"}
    name = own.get(kind, "fullatt_block_indexes")
    tree["vision_config"][name] = few[name]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    monkeypatch.setattr(modeling, "create_causal_mask", lambda **_: None)  # as for a sequence alone
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(trees, "scaled_dot_product_attention", flash_attention)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return Real(model.eval(), parse_shapes(model.config.to_dict(), "few layers", "few layers"))


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The fused kernels that GPUs choose, which the meta device does not."""
    if attn_mask is not None:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, attn_mask, True, dropout_p, False, scale=scale)[0]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, dropout_p, is_causal, scale=scale)[0]


def count(work: Callable[[], Any], causal: bool, seen: float = 0) -> Operations:
    """Operations of the modules. torch counts all pairs of a causal attention; kernels compute half.

    seen: of attention that is not causal nevertheless, in a tower."""
    with FlopCounterMode(display=False) as counter:
        work()
    of = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    flash, masked = (sum(n for op, n in of.items() if kind in op) for kind in ("flash", "efficient"))
    attention = masked + (seen + (flash - seen) / 2 if causal else flash)
    return Operations(sum(of.values()) - flash - masked, attention)


def close(formula: Operations, counted: Operations) -> None:
    assert formula.matrices == pytest.approx(counted.matrices, rel=WITHIN)
    assert formula.attention == pytest.approx(counted.attention, rel=WITHIN)


def test_the_vision_tower_for_clips_of_several_sizes(real):
    sizes = [time.size_of(real.shapes, grid) for grid in GRIDS]
    mean = time.vision_forward(real.shapes, time.mean_size(sizes))
    close(mean * len(GRIDS), count(lambda: real.see(GRIDS), causal=False))
    close(time.vision_forward(real.shapes, sizes[1]), count(lambda: real.see(GRIDS[1:]), causal=False))


TREES = {"long prefix": (200, 40), "short prefix": (20, 240)}  # tokens shared with the clip; of a branch


@dataclass
class Case:
    """A clip with the tokens after it, as one sequence or a tree of four."""

    sizes: Sizes
    tree: TreeSize
    how: dict[str, Any]  # the packing, if several
    rows: list[int]  # of responses

    @property
    def tokens(self) -> int:
        return int(self.tree.tokens - self.sizes.patches // 4)


def case_of(real: Real, kind: str) -> Case:
    seen = GRIDS[0][0] * GRIDS[0][1] * GRIDS[0][2] // 4
    if kind == "alone":
        size = time.size_of(real.shapes, GRIDS[0], seen + TEXT)
        tree = TreeSize(size.tokens, size.squared, 1, RESPONSE, RESPONSE**2)
        return Case(size, tree, {}, list(range(-RESPONSE, 0)))
    shared, branch = TREES[kind]
    prefix = seen + shared
    size = time.size_of(real.shapes, GRIDS[0], prefix + branch - RESPONSE)
    text = real.shapes.text
    tree = Tree((0, 1, 2, 3), prefix, (branch,) * 4)
    packing = Packing([tree], "sdpa", text.heads // text.key_heads, torch.bfloat16, torch.device("cpu"))
    packing.calls = [
        call._replace(mask=None if call.mask is None else call.mask.to("meta")) for call in packing.calls
    ]
    rows = [prefix + (i + 1) * branch - n for i in range(4) for n in range(RESPONSE, 0, -1)]
    return Case(size, TreeSize(prefix, prefix**2, 4, 4 * branch, 4 * branch**2), {"packing": packing}, rows)


@pytest.mark.parametrize("kind", ["alone", *TREES])
def test_a_tree_computes_its_prefix_once(real, kind):
    case, features = case_of(real, kind), real.see([GRIDS[0]])
    work = lambda: real.model.lm_head(real.read(features, case.tokens, **case.how)[0, case.rows])  # noqa: E731
    counted = count(work, causal=True)
    planned = time.tree_forward(real.shapes, case.sizes, case.tree, len(case.rows), "sdpa")
    close(planned + time.vision_forward(real.shapes, case.sizes) * -1, counted)


IN_TOWER = {"lora_targets": r".*(qkv|q_proj|linear_fc1|down_proj)", "freeze_vision": False}


@pytest.mark.parametrize(
    ("options", "again", "kind"),
    [
        ({}, True, "alone"),
        ({"freeze_vision": False}, True, "alone"),
        ({"freeze_vision": False}, False, "alone"),
        ({"lora_rank": 64}, True, "alone"),
        ({"lora_rank": 64} | IN_TOWER, False, "alone"),
        ({"logit_rows": RESPONSE // 4}, False, "alone"),
        ({}, True, "long prefix"),
        ({"freeze_vision": False}, False, "short prefix"),
    ],
    ids=[
        *("frozen tower", "all", "all, nothing again", "adapters", "adapters in the tower", "head in chunks"),
        *("a long prefix", "a short prefix"),
    ],
)
def test_a_pass_forward_and_backward(real, options, again, kind):
    case = case_of(real, kind)
    learner = LearnerConfig(gradient_checkpointing=again, micro_batch=int(case.tree.members), **options)
    with torch.device("meta"):
        choose_trained(real.model, learner)
    if again:
        checkpoint_layers(real.model)
    real.model.train()
    number = len(case.rows)

    def step() -> None:
        hidden = real.read(real.see([GRIDS[0]]), case.tokens, **case.how)[0, case.rows]
        targets = torch.zeros(number, dtype=torch.int64, device="meta")

        def loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor]:
            return (token_logprobs(logits, targets[rows]),)

        (rows,) = by_chunks(real.model.lm_head, hidden, loss, learner.logit_rows, number)
        rows.sum().backward()

    planned = time.update(real.shapes, learner, case.sizes, case.tree, RESPONSE)
    seen = time.vision_forward(real.shapes, case.sizes).attention
    if not learner.freeze_vision:
        seen *= 1 + time.BACKWARD_ATTENTION + again
    close(planned, count(step, causal=True, seen=seen))
