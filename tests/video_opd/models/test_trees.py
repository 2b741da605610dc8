"""Packed trees compute what transformers does for each of their sequences alone."""

import json
import logging
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from learner.adapters import checkpoint_layers, choose_trained
from tests.attention import install_stand_in
from tests.fakes import make_clip, make_prompt
from tests.models import MODELS, literal_positions
from tests.processors import FAMILIES
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.errors import ModelError
from video_opd.models import forward
from video_opd.models.forward import ResponseLogits, collate, load_model, token_logprobs
from video_opd.models.patches import pixel_values
from video_opd.models.prompting import PromptEncoder
from video_opd.models.trees import Packing, Tree, packed_places, trees_of
from video_opd.types import EncodedPrompt

SEQUENCES = 11  # of three clips: 5, 4 and 1 branches, and one of the first clip's frames at other times
TOLERANCE = 1e-5
Case = tuple[list[EncodedPrompt], list[np.ndarray]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param][0]().save_pretrained(path)
    MODELS[request.param]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cases(folder) -> dict[bool, Case]:
    """By whether the video comes first."""
    return {first: make_case(folder, first) for first in (True, False)}


def make_case(folder, video_first: bool) -> Case:
    config = PromptConfig(template="When? {query}", video_first=video_first)
    encoder = PromptEncoder(folder, config, VideoConfig(cache_dir=str(folder / "frames")))
    side, rng = 28 if "qwen2_5" in folder.name else 32, np.random.default_rng(0)
    plain, wide, cut = (replace(make_clip(duration_s=d), frame_size=(side, d * side)) for d in (2, 3, 1))
    slower = replace(plain, video_fps=0.8 * plain.video_fps)
    shapes = [(len(c.frame_indices), *c.frame_size, 3) for c in (plain, wide, cut)]
    videos = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    frames = dict(zip(map(id, (plain, wide, cut, slower)), [*videos, videos[0]], strict=True))
    asked = [
        (plain, q)
        for q in ("the", "a red square", "a red", "When does the circle appear?", "the blue circle")
    ]
    asked += [(wide, "red")] * 3 + [(wide, "blue"), (cut, "red"), (slower, "the")]
    begin, more = rng.integers(0, 200, (2, 4)).astype(np.int32)
    responses = [rng.integers(0, 200, n).astype(np.int32) for n in (3, 1, 7, 2, 5)]
    responses += [begin, np.concatenate([begin, more]), begin, more, more[:1], begin[:2]]
    order = rng.permutation(SEQUENCES)
    prompts = [
        encoder.encode(replace(make_prompt(q), clip=c, query=q), frames=frames[id(c)]) for c, q in asked
    ]
    return [prompts[i] for i in order], [responses[i] for i in order]


def by_transformers(model: Any, prompt: EncodedPrompt, response: np.ndarray) -> torch.Tensor:
    """float32[N, V]: logits by its own forward pass of one sequence, but literal positions for Qwen2.5-VL."""
    ids = torch.tensor(np.concatenate([prompt.token_ids, response])[None], dtype=torch.int64)
    types = torch.zeros_like(ids)
    types[0, : len(prompt.token_types)] = torch.tensor(prompt.token_types)
    positions = {}
    if prompt.second_per_grid is not None:
        literal = literal_positions(types[0].tolist(), prompt.video_grid_thw, prompt.second_per_grid)
        positions = {"position_ids": torch.tensor(literal).T[:, None]}
    logits = model(
        input_ids=ids,
        mm_token_type_ids=types,
        pixel_values_videos=pixel_values([prompt], "cpu"),
        video_grid_thw=torch.tensor([prompt.video_grid_thw]),
        **positions,
    ).logits[0]
    return logits[len(prompt.token_ids) - 1 : -1]


Computed = tuple[torch.Tensor, dict[str, torch.Tensor]]


def computed(model: Any, logits: torch.Tensor, case: Case) -> Computed:
    """Log-probs of all responses, and the gradients of their sum, weighted token by token."""
    targets = torch.from_numpy(np.concatenate(case[1]).astype(np.int64))
    logprobs = token_logprobs(logits, targets)
    (logprobs * torch.linspace(0.5, 1.5, len(targets))).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), gradients


@pytest.fixture(scope="module")
def separate(folder, cases):
    """By transformers' own model, each sequence alone; by whether its video comes first, and adapters."""
    known: dict[tuple[bool, bool], Computed] = {}

    def of(video_first: bool, adapters: bool) -> Computed:
        if (video_first, adapters) not in known:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            prepare(model, adapters, freeze=False)
            pairs = zip(*cases[video_first], strict=True)
            logits = torch.cat([by_transformers(model, *pair) for pair in pairs])
            known[video_first, adapters] = computed(model, logits, cases[video_first])
        return known[video_first, adapters]

    return of


def prepare(model: Any, adapters: bool, freeze: bool) -> None:
    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    options: Any = SimpleNamespace(
        lora_rank=4 * adapters, lora_alpha=8, lora_targets=targets, freeze_vision=freeze
    )
    choose_trained(model, options)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)


WAYS = [
    ("sdpa", False, ""),
    ("sdpa", True, ""),
    ("eager", True, ""),
    ("flash_attention_2", False, ""),
    ("sdpa", True, "frozen vision"),
    ("sdpa", True, "adapters"),
    ("sdpa", False, "question first"),
]


@pytest.mark.parametrize(("attention", "checkpoint", "what"), WAYS)
def test_branches_have_the_logprobs_and_gradients_of_separate_sequences(
    folder, cases, separate, monkeypatch, attention, checkpoint, what
):
    install_stand_in(monkeypatch)
    model = load_model(str(folder), "float32", attention=attention).train()
    prepare(model, what == "adapters", what == "frozen vision")
    if checkpoint:
        checkpoint_layers(model)
    video_first = what != "question first"
    batch = collate(*cases[video_first], pad_id=0)
    assert len(batch.videos) == (4 if video_first else 9)
    logprobs, gradients = computed(model, ResponseLogits(model)(batch), cases[video_first])
    expected, of_separate = separate(video_first, what == "adapters")
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained and trained <= of_separate.keys()
    for name in trained:
        gap, size = (gradients[name] - of_separate[name]).norm(), of_separate[name].norm()
        assert gap <= TOLERANCE * size, f"{name}: {gap / size}"


def test_the_last_layer_goes_on_with_the_rows_that_predict_responses_alone(folder, cases):
    model = load_model(str(folder), "float32")
    batch, layers, seen = collate(*cases[True], pad_id=0), model.model.language_model.layers, []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    alone = ResponseLogits(model).hidden(batch)
    assert seen == [len(batch.places)] * (len(layers) - 1) + [len(batch.rows)]
    of_all = ResponseLogits(model).hidden(replace(batch, rows=torch.arange(len(batch.places))))
    torch.testing.assert_close(of_all[batch.rows], alone, rtol=1e-4, atol=1e-5)


def test_the_last_layer_is_whole_where_features_of_the_tower_are_added_behind_it(tmp_path):
    config = MODELS["qwen3_vl"]().config
    config.text_config.num_hidden_layers = len(config.vision_config.deepstack_visual_indexes)
    FAMILIES["qwen3_vl"][0]().save_pretrained(tmp_path)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model, batch = load_model(str(tmp_path), "float32"), collate(*make_case(tmp_path, True), pad_id=0)
    whole = load_model(str(tmp_path), "float32").model.language_model.norm
    seen: list[torch.Tensor] = []
    model.model.language_model.norm.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    logits = ResponseLogits(model)(batch)
    expected = model.lm_head(whole(seen[0])[0, batch.rows])
    assert seen[0].shape[1] == len(batch.places) and torch.equal(logits, expected)


def test_a_process_says_once_what_prompts_share_that_differ_before_their_video(cases, monkeypatch, caplog):
    monkeypatch.setattr(forward, "_TOLD", Event())
    with caplog.at_level(logging.WARNING):
        collate(*cases[True], pad_id=0)  # equal frames at other times, as grey ones have, are nothing to say
        for _ in range(2):
            batch = collate(*cases[False], pad_id=0)
    tree = max(batch.trees, key=lambda t: len(t.members))
    (message,) = [record.getMessage() for record in caplog.records]
    count, separate = len(tree.members), tree.num_separate_tokens
    assert f"{count} sequences of one clip differ before its video, computed {count} times" in message
    assert f"share {separate - tree.num_tokens} of {separate} tokens (with prompt.video_first=true" in message


def test_layers_that_see_a_window_alone_are_refused_when_they_are_loaded(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"]
    kinds = ["sliding_attention"] + ["full_attention"] * (layers - 1)
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="1 layers with sliding windows, which are not supported"):
        load_model(str(tmp_path), "float32")


TREES = [
    Tree(members=(3, 0), prefix=7, branches=(3, 5)),
    Tree(members=(1,), prefix=6, branches=(0,)),
    Tree(members=(2, 4, 5), prefix=9, branches=(0, 2, 0)),  # one sequence, twice, begins another
    Tree(members=(6, 7), prefix=4, branches=(0, 0)),
    Tree(members=(8, 9, 10), prefix=0, branches=(2, 1, 2)),
    Tree(members=(11, 12, 13, 14, 15), prefix=1, branches=(1, 1, 4, 4, 9)),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_tokens_of_a_tree_attend_as_those_of_each_sequence_alone(attention, monkeypatch):
    """Heads share keys. Against softmax over what comes before a token in its own sequence."""
    install_stand_in(monkeypatch)
    torch.manual_seed(0)
    heads, groups, width, places = 4, 2, 8, packed_places(TREES)
    size = sum(tree.num_tokens for tree in TREES)
    query, key, value = (torch.randn(1, n, size, width) for n in (heads, heads // groups, heads // groups))
    config = SimpleNamespace(_attn_implementation=attention)
    module: Any = torch.nn.Linear(1, 1)
    module.is_causal, module.num_key_value_groups, module.config = True, groups, config
    packing = Packing(TREES, attention, groups, torch.float32, "cpu")
    function = ALL_ATTENTION_FUNCTIONS[attention]
    attended, _ = function(module, query, key, value, None, packing=packing, scaling=0.3)
    assert attended.shape == (1, size, heads, width)
    for of_sequence in places:
        q, k, v = (states[0][:, of_sequence] for states in (query, key, value))
        k, v = (states.repeat_interleave(groups, dim=0) for states in (k, v))
        after = torch.ones(len(of_sequence), len(of_sequence), dtype=torch.bool).triu(1)
        weights = (0.3 * q @ k.mT).masked_fill(after, -torch.inf).softmax(-1)
        torch.testing.assert_close(attended[0, of_sequence].transpose(0, 1), weights @ v)


def test_masks_grow_with_branches_alone_and_those_alike_are_made_once():
    trees = [Tree((0, 1, 2), prefix=1000, branches=(3, 5, 3)), Tree((3,), prefix=500, branches=(0,))]
    packing = Packing(trees, "sdpa", 2, torch.float32, "cpu")
    masks = [call.mask for call in packing.calls if call.mask is not None]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 6, 1003), (1, 1, 10, 1005), (1, 1, 6, 1003)]
    assert masks[0] is masks[2] and all(stride % 8 == 0 for mask in masks for stride in mask.stride()[:-1])


VIDEO = 9


def random_sequences(rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Of an alphabet so small that they begin alike, with a video of 4 tokens, some with times between."""
    sequences, types, clips = [], [], []
    for _ in range(rng.integers(1, 9)):
        clip = int(rng.integers(0, 2))
        before, after = (rng.integers(0, 2, rng.integers(0, n)) for n in (2, 5))
        video = [VIDEO, VIDEO, rng.integers(0, 2), VIDEO, VIDEO]
        sequence = np.concatenate([before, video, after]).astype(np.int32)
        sequences.append(sequence)
        types.append((sequence == VIDEO).astype(np.int32))
        clips.append(clip)
    return sequences, types, clips


def test_trees_share_what_their_sequences_begin_with_and_places_give_the_sequences_back():
    rng = np.random.default_rng(0)
    shared = 0
    for _ in range(300):
        sequences, types, clips = random_sequences(rng)
        trees = trees_of(sequences, types, clips)
        assert sorted(i for tree in trees for i in tree.members) == list(range(len(sequences)))
        ids = np.full(sum(tree.num_tokens for tree in trees), -1)
        for sequence, places in zip(sequences, packed_places(trees), strict=True):
            assert np.isin(ids[places], [-1, *sequence]).all()
            ids[places] = sequence
        assert (ids >= 0).all()
        for sequence, places in zip(sequences, packed_places(trees), strict=True):
            assert ids[places].tolist() == sequence.tolist()
        for tree in trees:
            assert len({clips[i] for i in tree.members}) == 1
            assert tree.prefix == literal_prefix([sequences[i].tolist() for i in tree.members])
            shared += tree.num_separate_tokens - tree.num_tokens
    assert shared > 1000


def literal_prefix(sequences: list[list[int]]) -> int:
    prefix, video = 0, sequences[0].index(VIDEO)
    while all(len(s) > prefix and s[prefix] == sequences[0][prefix] for s in sequences):
        prefix += 1
    return video if video < prefix < video + 5 else prefix


def test_a_clip_is_one_tree_unless_it_is_cheaper_to_share_a_video_in_several():
    video = [VIDEO] * 5

    def trees(*texts: tuple[list[int], list[int]]) -> list[tuple[tuple[int, ...], int]]:
        sequences = [np.array([*before, *video, *after], np.int32) for before, after in texts]
        found = trees_of(sequences, [(s == VIDEO).astype(np.int32) for s in sequences], ["clip"] * len(texts))
        return [(tree.members, tree.prefix) for tree in found]

    assert trees(([1], [2]), ([1], [3]), ([1], [2, 4])) == [((0, 1, 2), 6)]
    assert trees(([1, 2], [3]), ([1, 4], [3])) == [((0, 1), 1)], "they share a token of text"
    several = trees(([1, 2], [3]), ([1, 4, 5], [3]), ([1, 2], [6]), ([1, 4, 6], [3]))
    assert several == [((0, 2), 7), ((1,), 9), ((3,), 9)], "two share their video"
    assert trees_of([np.ones(3, np.int32)] * 2, [np.zeros(3)] * 2, [0, 0]) == [Tree((0, 1), 3, (0, 0))]
