"""DeepSpeed ranks as Ray actors against one plain torch process on the same batch."""

import asyncio
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import ray
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from driver.start_ray import check_nodes
from learner import export
from learner.adapters import add_adapters, choose_trained
from learner.learner import Learner
from learner.rank import LearnerRank
from preflight.disk import checkpoint_bytes
from preflight.model_shapes import read_shapes
from teacher_service.engine import TransformersEngine, Wanted
from tests.real.conftest import DEMO, reference_logprobs, scored_groups
from video_opd import logs
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import ConfigError, ModelError, SaveError
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, load_model
from video_opd.models.policy import BANNED
from video_opd.models.prompting import PromptEncoder
from video_opd.types import Prompt, ScoredGroup
from video_opd.weights.buckets import unpack

# Adam's first steps move a weight by about lr whatever the size of its gradient. Where a gradient is almost
# zero, another order of summation changes a part of that step. Hence one bound for the worst weight and one
# for all of them.
LR, STEPS = 1e-3, 2
WORST, RMS = 0.2 * LR, 0.002 * LR
BASELINE = 0.4  # of rewards


# DeepSpeed keeps parameters of up to 1e5 elements whole, so all of these models'.
SHARDED = (
    "learner.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "learner.gradient_checkpointing=true",
)
LORA, MERGED = ("learner.lora_rank=4", "learner.lora_alpha=8"), "learner.lora_publish=merged"
AT_SCALE = (*SHARDED, *LORA, MERGED, "learner.freeze_vision=true", "learner.dtype=bfloat16")


def make_config(overrides, world_size: int, stage: int, *more: str):
    return load_config(
        DEMO,
        [
            *overrides,
            f"learner.world_size={world_size}",
            f"learner.zero_stage={stage}",
            f"learner.lr={LR}",
            "learner.warmup_frac=0",
            "learner.micro_batch=3",
            "learner.logit_rows=5",  # fewer than a micro-batch has
            "start_timeout_s=120",
            "request_timeout_s=120",
            "learner.freeze_vision=false",
            "learner.final_lr_frac=1",
            *("learner.betas=[0.9, 0.95]", "learner.weight_decay=0.1"),  # of configs/paper/released.yaml
            "loss.clamp=null",
            *more,
        ],
    )


def batches(config, prompts, encoder):
    """Seven groups a step: neither ranks nor micro-batches come out even."""
    sampled, rollouts = config.loss.needs.rollouts, config.rollout.rollouts_per_prompt
    steps = [
        scored_groups(prompts[i * 7 : i * 7 + 7], encoder, seed=i, rollouts=rollouts, sampled=sampled)
        for i in range(STEPS)
    ]
    return [with_signals(groups) for groups in steps] if config.loss.task_weight else steps


def with_signals(groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The first response is the ground truth, and the second one's answer is right."""

    def changed(group: ScoredGroup, **changes: Any) -> ScoredGroup:
        (trajectory,) = group.group.trajectories
        return replace(group, group=replace(group.group, trajectories=(replace(trajectory, **changes),)))

    n = len(groups[0].group.trajectories[0].response_token_ids)
    unsampled = {"prompt_token_ids": np.zeros(0, np.int32), "actor_logprobs": np.zeros(n, np.float32)}
    truth = replace(changed(groups[0], prompt_fingerprint=None, **unsampled), rewards=None)
    right = changed(groups[1], predicted_spans_s=groups[1].group.prompt.answer_spans_s)
    return [truth, right, *groups[2:]]


def literal_loss(config, groups, logits: torch.Tensor, targets: torch.Tensor, pad_ids) -> torch.Tensor:
    """The summed loss of a batch in float64, by the formulas of docs/algorithm.md."""
    loss = config.loss
    trajectories = [t for g in groups for t in g.group.trajectories]
    scores: list[Any] = [s for g in groups for s in g.scores]

    def concatenated(arrays) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).double()

    def policy(raw: torch.Tensor) -> torch.Tensor:
        scaled = raw.double() / config.rollout.temperature
        return scaled.index_fill(-1, torch.tensor(pad_ids), BANNED).log_softmax(-1)

    student = policy(logits)
    taken = student[torch.arange(len(targets)), targets]
    actor = concatenated(t.actor_logprobs for t in trajectories)
    teacher = concatenated(s.teacher_logprobs for s in scores)
    ratio = (taken - actor).exp()
    match loss.kind:
        case "opd" if loss.task_weight:
            sizes = [len(t.response_token_ids) for t in trajectories]
            rewards = [g.rewards[0] - BASELINE if g.rewards else 0.0 for g in groups]
            a, place = (torch.tensor(np.repeat(v, sizes)) for v in (rewards, range(len(sizes))))
            r = loss.distill_weight * (teacher - torch.where(place == 0, taken.detach(), actor))
            of_rollouts = ratio * (r * (place > 1) + loss.task_weight * a)
            return -torch.where(place == 0, r * taken, of_rollouts).sum()
        case "opd":
            return -(ratio * (teacher - actor)).sum()
        case "opd_topk":
            ids = concatenated(s.top_k.ids for s in scores).long()
            top = concatenated(s.top_k.logprobs for s in scores)
            p, q = (
                torch.cat([of_set.exp(), 1 - of_set.exp().sum(-1, keepdim=True)], -1)
                for of_set in (student.gather(-1, ids), top)
            )
            return by_entropy(loss, p.log(), q.log(), -(q * q.log()).sum(-1)).sum()
        case "opd_full" | "off_policy_fkd":
            embeddings = load_model(config.teacher, "float32").get_input_embeddings().weight.detach()
            whole = policy(concatenated(s.hidden for s in scores).float() @ embeddings.T)
            if loss.kind == "off_policy_fkd":
                return (whole.exp() * (whole - student)).sum()
            return by_entropy(loss, student, whole, concatenated(s.entropy for s in scores)).sum()
        case "grpo":
            advantages = []
            for group in groups:
                mean = sum(group.rewards) / len(group.rewards)
                std = (sum((r - mean) ** 2 for r in group.rewards) / len(group.rewards)) ** 0.5
                for trajectory, reward in zip(group.group.trajectories, group.rewards, strict=True):
                    advantages += [(reward - mean) / (std + 1e-4)] * len(trajectory.response_token_ids)
            a = torch.tensor(advantages, dtype=torch.float64)
            away = (teacher - taken).exp() - 1 - (teacher - taken)
            return (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + loss.kl_coef * away).sum()
    raise AssertionError(loss.kind)


def by_entropy(loss, p: torch.Tensor, q: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probs, or KL(q || p) where the entropy of q is large."""
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    if loss.forward_kl_entropy is None:
        return reverse
    is_forward = entropy >= loss.forward_kl_entropy
    assert 0.2 < is_forward.float().mean() < 0.8
    return torch.where(is_forward, forward, reverse)


def untrained(config) -> VideoLLM:
    """The whole student in this process, in float32, with the adapters that ranks draw."""
    model = load_model(config.student, "float32")
    torch.manual_seed(config.seed)
    choose_trained(model, config.learner)
    return model


def reference(config, prompts, encoder) -> dict[str, np.ndarray]:
    """Plain torch: each sequence alone, the literal loss over the whole batch at once, clipped, AdamW."""
    model = untrained(config).train()
    logits_of = ResponseLogits(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    for groups in batches(config, prompts, encoder):
        rows = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
        encoded, responses = [encoder.encode(p) for p, _ in rows], [t.response_token_ids for _, t in rows]
        pairs, pad_id = zip(encoded, responses, strict=True), encoder.tokenizer.pad_token_id
        logits = torch.cat([logits_of(collate([e], [r], pad_id)) for e, r in pairs])
        targets = torch.from_numpy(np.concatenate(responses).astype(np.int64))
        loss = literal_loss(config, groups, logits, targets, encoder.pad_ids)
        optimizer.zero_grad()
        (loss / len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.learner.max_grad_norm)
        optimizer.step()
    return arrays(model)


def arrays(model: VideoLLM) -> dict[str, np.ndarray]:
    return {n: p.detach().float().numpy() for n, p in model.named_parameters()}


class KeptRank(LearnerRank):
    """A process that serves the next learner too: it imports torch for longer than it trains."""

    def start_again(self, config: Config) -> None:
        import deepspeed

        import learner.engine

        learner.engine._init_deepspeed = lambda *_: deepspeed  # the process group of the first start stays
        self._config = config
        self._engine = learner.engine.LearnerEngine(config, self._rank, config.learner.world_size, ("", 0))


class Learners:
    """One learner of one rank and one of two, each trained as many configurations in turn as ask for it."""

    def __init__(self):
        self.started: dict[int, Learner] = {}

    async def __call__(self, config: Config) -> Learner:
        world_size = config.learner.world_size
        if world_size in self.started:
            kept = self.started[world_size]
            kept._config = config
            await kept._all("start_again", config)
            return kept
        kept = self.started[world_size] = Learner(f"kept{world_size}", config, KeptRank)
        await kept.start()
        return kept

    def stop(self) -> None:
        for kept in self.started.values():
            kept.stop()


@pytest.fixture(scope="module")
def learners(local_ray) -> Iterator[Learners]:
    made = Learners()
    yield made
    made.stop()


async def parameters_of(learner: Learner, version: int) -> dict[str, np.ndarray]:
    """As they are published."""
    references, _ = await learner.put_weights(version)
    return {n: t.float().numpy().copy() for n, t in unpack(ray.get(references, timeout=60))}


async def train(learner: Learner, config, prompts, encoder, folder=None):
    """The learner's parameters after the same updates; its metrics; checkpoint if asked."""
    batched = enumerate(batches(config, prompts, encoder))
    baseline = BASELINE if config.loss.task_weight else None
    reports = [await learner.update(groups, step, baseline) for step, groups in batched]
    if folder:
        await learner.save(folder)
    return await parameters_of(learner, STEPS), [r.metrics for r in reports]


def largest_gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[n] - theirs[n]).max()) for n in ours)


GRPO = ["rollout.rollouts_per_prompt=2", "loss.kl_coef=0.5"]
SIGNALS = [
    f"loss.{option}"
    for option in ("distill_weight=0.5", "task_weight=0.7", "task_gate=0.7", "on_policy_frac=0.8")
]
EVERY_OBJECTIVE = [
    (1, 2, "opd_topk"),
    (2, 0, "opd"),
    (2, 2, "opd_topk loss.forward_kl_entropy=1.8"),
    (2, 3, "opd"),
    (2, 2, "opd_full loss.forward_kl_entropy=0.7"),
    (2, 2, "grpo"),
    (2, 2, "off_policy_fkd"),
]


def test_a_rank_starts_without_torchs_compiler(learners, overrides):
    """DeepSpeed imports it, for 1.7 s of CPU time, to ask whether an optimizer is its own Muon."""

    async def run() -> list[bool]:
        learner = await learners(make_config(overrides, 1, 2))
        return await learner._all("__ray_call__", lambda _: "torch._inductor.lowering" in sys.modules)

    assert asyncio.run(run()) == [False]


@pytest.mark.parametrize(("world_size", "stage", "loss"), EVERY_OBJECTIVE)
def test_ranks_compute_what_one_process_does(learners, overrides, prompts, encoder, world_size, stage, loss):
    options = {("grpo", 2): GRPO, ("opd", 3): SHARDED, ("opd", 0): SIGNALS}.get((loss, stage), [])
    if world_size == 2:
        options = [*options, "rollout.temperature=0.7"]
    config = make_config(overrides, world_size, stage, *f"loss.kind={loss}".split(), *options)
    expected = reference(config, prompts, encoder)

    async def run():
        learner = await learners(config)
        roles = await learner._all("__ray_call__", lambda _: logs.work.role)
        assert roles == [f"learner-{rank}" for rank in range(world_size)], "in its log"
        return await train(learner, config, prompts, encoder)

    parameters, metrics = asyncio.run(run())
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    moved = largest_gap(parameters, start)
    assert moved > 0.5 * LR, "the updates must move the weights for the comparison to mean anything"
    assert largest_gap(parameters, expected) < WORST
    gaps = np.concatenate([(parameters[n] - expected[n]).ravel() for n in expected])
    assert np.sqrt(np.mean(np.square(gaps))) < RMS
    tokens = [
        sum(len(t.response_token_ids) for g in groups for t in g.group.trajectories)
        for groups in batches(config, prompts, encoder)
    ]
    assert [m["learner/num_tokens"] for m in metrics] == tokens
    if stage:  # DeepSpeed reports no norm at stage 0
        assert all(m["learner/grad_norm"] > 0 for m in metrics)


def three_queries_of_each(prompts: list[Prompt]) -> list[Prompt]:
    """Of the clips of the prompts."""
    return [
        replace(prompt, prompt_id=f"{prompt.clip.clip_id}/{number}", query=f"the {number} is visible")
        for prompt in {p.clip.video_path: p for p in prompts}.values()
        for number in range(3)
    ]


def teacher_of(config: Config) -> TransformersEngine:
    folder = config.teacher_models[0].model
    encoder = PromptEncoder(folder, config.prompt, config.video)
    return TransformersEngine(folder, config.teacher_pool, Wanted(), config.seed, encoder)


def scored_by(engine: TransformersEngine, groups: list[ScoredGroup], together: bool) -> list[ScoredGroup]:
    """The groups, of one rollout each, with the teacher's log-probs: in one pass, or in one pass for each."""
    prompts = [engine.encoder.encode(g.group.prompt) for g in groups]
    responses = [g.group.trajectories[0].response_token_ids for g in groups]
    size = len(groups) if together else 1
    scores = [
        s for i in range(0, len(groups), size) for s in engine.score(prompts[i:][:size], responses[i:][:size])
    ]
    return [
        replace(g, scores=(replace(g.scores[0], teacher_logprobs=s.logprobs),))
        for g, s in zip(groups, scores, strict=True)
    ]


def test_learner_and_teacher_that_share_passes_end_with_the_weights_of_those_that_do_not(
    learners, overrides, prompts
):
    """Three queries a clip: two ranks of ZeRO-3, with checkpointing, and one sequence at a time."""
    options = ("loss.kind=opd", "prompt.video_first=true", *SHARDED)
    sharing = ("learner.micro_batch=4", "learner.tree_tokens=200"), ("learner.micro_batch=1",)
    shared, separate = (make_config(overrides, 2, 3, *options, *more) for more in sharing)
    encoder = PromptEncoder(shared.student, shared.prompt, shared.video)
    teacher = teacher_of(shared)
    asked = three_queries_of_each(prompts)
    steps = [scored_groups(asked[9 * i :][:9], encoder, seed=i) for i in range(STEPS)]

    async def run(config: Config, together: bool) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        learner = await learners(config)
        scored = [scored_by(teacher, groups, together) for groups in steps]
        metrics = [(await learner.update(groups, step)).metrics for step, groups in enumerate(scored)]
        return await parameters_of(learner, STEPS), metrics

    async def both():
        return (
            await run(shared, together=True),
            teacher.num_computed_tokens,
            await run(separate, together=False),
        )

    (ours, metrics), of_passes, (expected, alone) = asyncio.run(both())
    assert of_passes < 0.7 * (teacher.num_computed_tokens - of_passes)
    gaps = np.concatenate([(ours[n] - expected[n]).ravel() for n in expected])
    assert np.abs(gaps).max() < WORST and np.sqrt(np.mean(np.square(gaps))) < RMS
    start = {n: p.detach().numpy() for n, p in load_model(shared.student, "float32").named_parameters()}
    assert largest_gap(ours, start) > 0.5 * LR
    for found, wanted in zip(metrics, alone, strict=True):
        tokens = found["learner/computed_tokens"], found["learner/separate_tokens"]
        assert tokens[0] < 0.7 * tokens[1] and tokens[1] == wanted["learner/separate_tokens"]
        assert found["learner/loss"] == pytest.approx(wanted["learner/loss"], rel=1e-3)
        assert found["learner/ratio_p99"] == pytest.approx(wanted["learner/ratio_p99"], rel=1e-3)


def fill_disk(rank: Any) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    rank._engine._engine.checkpoint_engine.save = save


def make_room(rank: Any) -> None:
    del rank._engine._engine.checkpoint_engine.save


def check_planned_bytes(config: Config, folder: Path) -> None:
    """Of the tensors alone: the headers of tiny ones and text files do not grow with the model."""
    written = 0
    for path in folder.rglob("*.pt"):  # torch's files are archives
        with ZipFile(path) as archive:
            written += sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            written += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    assert written == pytest.approx(checkpoint_bytes(config, read_shapes(config.student)), rel=0.02)


class RankElsewhere(LearnerRank):
    """On a node that sees nothing of what the driver has."""

    def sees(self, path: Path) -> tuple[str, bool]:
        return "elsewhere", False


@pytest.mark.parametrize("more_options", [(2,), (3, *AT_SCALE)], ids=["whole", "at scale"])
def test_a_checkpoint_restores_weights_and_optimizer_exactly_and_its_student_loads(
    learners, overrides, prompts, encoder, tmp_path, tmp_path_factory, more_options
):
    """Also one from before the first update, and one after a save that one rank could not write."""
    stage, *options = more_options
    config = make_config(overrides, 2, stage, "loss.kind=opd_topk", *options)
    start, end = tmp_path / "start", tmp_path / "end"
    start.mkdir()
    end.mkdir()
    more = scored_groups(prompts[20:26], encoder, seed=9)

    async def go_on(learner):
        await learner.update(more, STEPS)
        return await parameters_of(learner, STEPS + 1) | await state_of(learner)

    async def run():
        learner = await learners(config)
        await learner.save(start)
        second: Any = learner._ranks[1]
        await second.__ray_call__.remote(fill_disk)
        with pytest.raises(SaveError, match=r"rank 1: .*No space left"):
            await learner.save(tmp_path_factory.mktemp("full"))
        await second.__ray_call__.remote(make_room)
        saved, _ = await train(learner, config, prompts, encoder, end)
        after = await go_on(learner)
        fresh = Learner(f"after{stage}", config, RankElsewhere)
        await fresh.start()
        await fresh.load(end)
        assert not list(tmp_path.glob(".*.tmp")), "nothing is left of the copy"
        resumed = await go_on(fresh)
        await fresh.load(start)
        from_start, _ = await train(fresh, config, prompts, encoder)
        fresh.stop()
        return saved, after, resumed, from_start

    saved, uninterrupted, resumed, from_start = asyncio.run(run())
    check_planned_bytes(config, end)
    assert largest_gap(from_start, saved) == 0
    assert largest_gap({n: uninterrupted[n] for n in saved}, saved) > 0.1 * LR
    assert largest_gap(uninterrupted, resumed) == 0
    exported = {
        n: p.detach().numpy() for n, p in load_model(str(end / "student"), "float32").named_parameters()
    }
    assert largest_gap(exported, saved) == 0


def optimizer_state(rank: Any) -> dict[str, tuple[np.ndarray, ...]]:
    """Whole float32 weight and Adam moments of every trained parameter. All ranks must run it together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = rank._engine
    state = {}
    for name, parameter in engine._model.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine._config.learner.zero_stage:
            tensors: list[Any] = [safe_get_full_fp32_param(parameter)]
            tensors += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
        else:
            of_parameter = engine._engine.optimizer.state[parameter]
            tensors = [parameter.detach(), of_parameter["exp_avg"], of_parameter["exp_avg_sq"]]
        state[name] = tuple(t.float().numpy().copy() for t in tensors)
    return state


async def state_of(learner: Learner) -> dict[str, np.ndarray]:
    """optimizer_state, as one array for each name and part."""
    state = (await learner._all("__ray_call__", optimizer_state))[0]
    return {f"{name} {i}": part for name, parts in state.items() for i, part in enumerate(parts)}


@pytest.mark.parametrize(
    ("stage", "before", "after", "dtype"), [(0, 2, 1, "float32"), (2, 2, 1, "float32"), (3, 1, 2, "bfloat16")]
)
def test_another_number_of_ranks_goes_on_exactly(
    learners, overrides, prompts, encoder, tmp_path, stage, before, after, dtype
):
    scale = AT_SCALE if stage == 3 else (f"learner.dtype={dtype}", "learner.freeze_vision=true")
    options = ("loss.kind=opd", *scale)
    more = scored_groups(prompts[20:26], encoder, seed=9)

    async def state(learner):
        ranks: list[Any] = learner._ranks
        return (await asyncio.gather(*(rank.__ray_call__.remote(optimizer_state) for rank in ranks)))[0]

    async def states(learner):
        """Now, and after one more update."""
        now = await state(learner)
        await learner.update(more, STEPS)
        return now, await state(learner)

    async def run():
        config = make_config(overrides, before, stage, *options)
        learner = await learners(config)
        for step, groups in enumerate(batches(config, prompts, encoder)):
            await learner.update(groups, step)
        (tmp_path / "c").mkdir()
        await learner.save(tmp_path / "c")
        saved = await states(learner)
        fresh = Learner(f"more{stage}", make_config(overrides, after, stage, *options))
        await fresh.start()
        await fresh.load(tmp_path / "c", saved_world_size=before)
        loaded = await states(fresh)
        fresh.stop()
        return saved, loaded

    saved, loaded = asyncio.run(run())
    check_planned_bytes(make_config(overrides, before, stage, *options), tmp_path / "c")
    bounds = (LR, 1e-3, 1e-5) if dtype == "bfloat16" else (WORST / 100, 1e-7, 1e-9)
    for when, exact in ((0, True), (1, False)):
        assert saved[when].keys() == loaded[when].keys() and saved[when]
        for part, bound in enumerate(bounds):
            gap = largest_gap(
                {n: s[part] for n, s in saved[when].items()}, {n: s[part] for n, s in loaded[when].items()}
            )
            assert gap == 0 if exact else gap < bound
    assert (
        largest_gap({n: s[0] for n, s in saved[0].items()}, {n: s[0] for n, s in saved[1].items()}) > 0.5 * LR
    )
    assert not list(tmp_path.glob(".*")), "nothing of the conversion is left"


OFFLOAD = ("learner.deepspeed.zero_optimization.offload_optimizer.device=cpu",)
WEIGHTS_TOO = (*OFFLOAD, "learner.deepspeed.zero_optimization.offload_param.device=cpu")


@pytest.mark.parametrize(
    ("stage", "saved", "loaded"), [(1, (), OFFLOAD), (2, (), OFFLOAD), (3, WEIGHTS_TOO, ())], ids=[1, 2, 3]
)
def test_many_micro_batches_add_up_in_float32_and_offloaded_states_are_the_same_states(
    learners, overrides, prompts, encoder, tmp_path, stage, saved, loaded
):
    """16 times the same row: every gradient is 1/16 of the row's own, exactly, and so must be their sum."""
    options = (
        "learner.dtype=bfloat16",
        "learner.micro_batch=1",
        "learner.max_grad_norm=1e9",
        "loss.kind=opd",
    )
    row, *others = scored_groups(prompts[:5], encoder, seed=0)

    async def state(learner) -> dict[str, tuple[np.ndarray, ...]]:
        return (await learner._all("__ray_call__", optimizer_state))[0]

    async def gradient(groups, *more: str) -> np.ndarray:
        """What Adam's first moment is made of, by a learner that is new but for its processes."""
        learner = await learners(make_config(overrides, 2, stage, *options, *more))
        await learner.update(groups, 0)
        return np.concatenate([moment.ravel() for _, moment, _ in (await state(learner)).values()])

    async def run():
        alone = await gradient([row, row])
        rounded = await gradient([row] * 16, "learner.grad_accum_dtype=bfloat16")
        summed = await gradient([row] * 16, *saved)
        learner = learners.started[2]
        await learner.save(tmp_path)
        await learner.update(others, 1)
        before = await state(learner)
        learner = await learners(make_config(overrides, 2, stage, *options, *loaded))
        await learner.load(tmp_path)
        await learner.update(others, 1)
        return alone, rounded, summed, before, await state(learner)

    alone, rounded, summed, before, after = asyncio.run(run())
    errors = [np.linalg.norm(g - alone) / np.linalg.norm(alone) for g in (summed, rounded)]
    assert errors[1] > 1e-3, "the bound below must mean anything"
    assert errors[0] == (errors[1] if stage == 1 else 0)
    assert all((a == b).all() for n in before for a, b in zip(before[n], after[n], strict=True))


def whole_parameters(rank: Any) -> list[str]:
    """Parameters that are not sharded between updates, or that a pass gathers before it needs them."""
    module = rank._engine._engine.module
    whole = [name for name, p in module.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
    return whole + [f"external {p.ds_shape}" for p in module._external_params.values()]


def small_files(rank: Any) -> None:
    from learner import export

    export.FILE_BYTES = 100_000


def usual_files(rank: Any) -> None:
    from learner import export

    export.FILE_BYTES = 2 << 30


def test_a_sharded_learner_in_bfloat16_moves_as_one_float32_process_does(
    learners, overrides, prompts, encoder, tmp_path
):
    """Compares directions: Adam's first steps move a weight by about lr whatever the size of its gradient.

    bfloat16 has 8 bits, so a gradient below 1 / 256 of what it is summed from may have the other sign.
    """
    config = make_config(overrides, 2, 3, "loss.kind=opd", *AT_SCALE)
    start, end = arrays(untrained(config)), reference(config, prompts, encoder)
    (tmp_path / "file").touch()

    async def run():
        learner = await learners(config)
        await train(learner, config, prompts, encoder)
        moved, whole = await state_of(learner), await learner._all("__ray_call__", whole_parameters)
        await learner._all("__ray_call__", small_files)
        with pytest.raises(SaveError):  # rank 0 cannot write the first file, and ranks gather to the last
            await learner.export(tmp_path / "file")
        await learner.export(tmp_path / "student")
        await learner._all("__ray_call__", usual_files)
        return moved, whole, await parameters_of(learner, STEPS)

    moved, whole, published = asyncio.run(run())
    names = [n for n in start if f"{n} 0" in moved]
    assert names and all(".lora_" in n for n in names)
    rounded = {n: torch.from_numpy(start[n]).bfloat16().float().numpy() for n in names}
    ours = np.concatenate([(moved[f"{n} 0"] - rounded[n]).ravel() for n in names])
    theirs = np.concatenate([(end[n] - start[n]).ravel() for n in names])
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.95
    assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=0.01)
    assert whole == [[], []]
    assert (tmp_path / "student" / "model.safetensors.index.json").exists()
    assert largest_gap(arrays(load_model(str(tmp_path / "student"), "bfloat16")), published) == 0


def problems_of_a_share(rank: Any, folder: str) -> list[str]:
    """What is wrong with what this rank holds of a student that it loads anew."""
    from learner import loading

    config = rank._config.model_copy(update={"student": folder})
    shard, problems = loading.shard, []

    def unread(model: VideoLLM, learner: Any) -> None:
        maps = Path("/proc/self/maps").read_text().splitlines()
        ends = [line.split()[0].split("-") for line in maps if folder in line]
        spans = [range(int(first, 16), int(last, 16)) for first, last in ends]
        for name, parameter in model.named_parameters():
            if not any(parameter.data_ptr() in span for span in spans):
                problems.append(f"{name} is a copy of the file before it is sharded")
        shard(model, learner)

    loading.shard = unread
    ours = loading.load_student(config)
    loading.shard = shard
    if folder in Path("/proc/self/maps").read_text():
        problems.append("a part of the file is still in use")
    plain = load_model(folder, config.learner.dtype)
    for (name, parameter), whole in zip(ours.named_parameters(), plain.parameters(), strict=True):
        share, kept = -(-whole.numel() // 2), parameter.ds_tensor
        part = whole.detach().flatten()[rank._rank * share :][:share]
        if parameter.numel() or len(kept) != share or not torch.equal(kept[: len(part)], part):
            problems.append(f"{name} is not this rank's half")
    for (name, ours_), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        if ours_.dtype != theirs.dtype or not torch.equal(ours_, theirs):
            problems.append(f"buffer {name} differs")
    if (ours.lm_head.weight is ours.get_input_embeddings().weight) != plain.config.tie_word_embeddings:
        problems.append("the head is not tied as it should be")
    if ours.config.to_dict() != plain.config.to_dict():
        problems.append("the model's config differs")
    return problems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_reads_its_share_of_the_student(learners, overrides, config, tmp_path, dtype):
    """Of both families; the files' dtype and another."""
    from tests.models import write_qwen2_5  # not above: ranks import this file

    shutil.copytree(config.student, tmp_path / "qwen3")
    write_qwen2_5(tmp_path / "qwen2_5", hidden=64, padded=5, seed=0)
    sharded = make_config(overrides, 2, 3, f"learner.dtype={dtype}")

    async def run():
        learner = await learners(sharded)
        folders = [str(tmp_path / family) for family in ("qwen3", "qwen2_5")]
        return [await learner._all("__ray_call__", problems_of_a_share, folder) for folder in folders]

    assert asyncio.run(run()) == [[[], []], [[], []]]


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_an_export_in_several_files_has_the_students_names(config, tmp_path, monkeypatch, family):
    monkeypatch.setattr(export, "FILE_BYTES", 100_000)
    source = Path(config.student)
    if family == "qwen2_5":  # transformers 5 has other names in memory
        from tests.models import write_qwen2_5

        source = tmp_path / "source"
        write_qwen2_5(source, hidden=64, padded=5, seed=0)
    model = load_model(str(source), "float32")
    changed = {n: p.detach() + 1 for n, p in model.named_parameters()}
    expected = {n: t.numpy() for n, t in changed.items()}
    export.write_student(model, iter(changed.items()), str(source), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(str(path), "pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), path.name)
    assert names == index["weight_map"] and len(set(names.values())) > 5
    with safe_open(str(source / "model.safetensors"), "pt") as tensors:
        assert set(tensors.keys()) == names.keys()
    assert largest_gap(arrays(load_model(str(tmp_path / "out"), "float32")), expected) == 0
    others = {p.name for p in source.iterdir()} - {"model.safetensors"}
    assert others <= {p.name for p in (tmp_path / "out").iterdir()}


def test_weights_that_a_folder_lacks_are_not_drawn(config, tmp_path):
    shutil.copytree(config.student, tmp_path / "student")
    path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, e\.g\. model\.language_model\.norm\.weight"):
        load_model(str(tmp_path / "student"), "float32")


def test_a_node_without_the_package_of_an_attention_says_so_before_anything_starts(local_ray, config):
    learner = config.learner.model_copy(update={"attn_implementation": "flash_attention_2"})
    with pytest.raises(
        ConfigError, match="flash-attn, and a node of the learner has none: install it, or use"
    ):
        check_nodes(config.model_copy(update={"learner": learner}))


def test_a_frozen_vision_tower_keeps_its_weights(learners, overrides, prompts, encoder):
    config = make_config(overrides, 1, 0, "learner.freeze_vision=true", "loss.kind=opd")

    async def run():
        return await train(await learners(config), config, prompts, encoder)

    parameters, _ = asyncio.run(run())
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    vision = [n for n in start if n.startswith("model.visual.")]
    assert len(vision) > 10
    assert all((parameters[n] == start[n]).all() for n in vision)
    assert any((parameters[n] != start[n]).any() for n in start if n not in vision)


def with_actor_logprobs(groups: list[ScoredGroup], model, encoder) -> list[ScoredGroup]:
    """As if a plain transformers model had sampled them."""
    changed = []
    for group in groups:
        (trajectory,) = group.group.trajectories
        response = trajectory.response_token_ids
        logprobs = reference_logprobs(model, encoder.encode(group.group.prompt), response)[
            np.arange(len(response)), response
        ]
        trajectories = (replace(trajectory, actor_logprobs=logprobs.astype(np.float32)),)
        changed.append(replace(group, group=replace(group.group, trajectories=trajectories)))
    return changed


def test_lora_trains_adapters_alone_and_publishes_and_exports_what_it_computes(
    learners, overrides, prompts, encoder, tmp_path
):
    from peft import PeftModel  # not above: the ranks import this file, and must import video_opd first

    def loaded(folder: str) -> VideoLLM:
        return load_model(folder, "float32").eval()

    config = make_config(overrides, 2, 3, "loss.kind=opd", *LORA, *SHARDED)
    start = arrays(loaded(config.student))

    async def run():
        learner = await learners(config)
        published, _ = await train(learner, config, prompts, encoder, tmp_path)
        plain = loaded(str(tmp_path / "student"))
        again = with_actor_logprobs(scored_groups(prompts[:6], encoder, seed=3), plain, encoder)
        report = await learner.update(again, STEPS)
        single = make_config(overrides, 1, 2, "loss.kind=opd", *LORA)
        alone, _ = await train(await learners(single), single, prompts, encoder)
        return published, report.metrics, alone

    published, metrics, alone = asyncio.run(run())
    exported = arrays(loaded(str(tmp_path / "student")))
    assert exported.keys() == start.keys(), "the plain model's names and no others"
    changes = {n: exported[n] - start[n] for n in start if (exported[n] != start[n]).any()}
    assert changes and all(
        re.fullmatch(config.learner.lora_targets, n.removesuffix(".weight")) for n in changes
    )
    assert {np.linalg.matrix_rank(c, tol=1e-6) for c in changes.values()} <= {1, 2, 3, 4}
    assert max(np.abs(c).max() for c in changes.values()) > 0.1 * LR
    assert metrics["learner/logprob_gap_max"] < 1e-4, "learner and exported weights are one model"
    assert largest_gap(published, alone) < WORST, "ranks draw the same adapters"
    assert largest_gap(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), published) == 0
    by_peft: Any = PeftModel.from_pretrained(loaded(config.student), str(tmp_path / "adapter"))
    assert largest_gap(arrays(by_peft.merge_and_unload()), exported) < 1e-6


def test_lora_targets_that_name_no_layer_are_one_line(config):
    learner = config.learner.model_copy(update={"lora_rank": 4, "lora_targets": ".*nothing"})
    with pytest.raises(ConfigError, match=r"learner\.lora_targets='\.\*nothing' takes no adapters"):
        add_adapters(load_model(config.student, "float32"), learner)


def test_cached_vision_features_change_nothing_but_the_work(learners, overrides, prompts, encoder):
    plain_config = make_config(
        overrides, 1, 2, "loss.kind=grpo", "rollout.rollouts_per_prompt=2", "learner.freeze_vision=true"
    )
    cached_config = plain_config.model_copy(
        update={"learner": plain_config.learner.model_copy(update={"vision_cache_bytes": 1 << 20})}
    )

    async def run():
        expected, _ = await train(await learners(plain_config), plain_config, prompts, encoder)
        cached = await learners(cached_config)
        ours, first = await train(cached, cached_config, prompts, encoder)
        again = await cached.update(batches(cached_config, prompts, encoder)[0], STEPS)
        return expected, ours, first, again.metrics

    expected, ours, first, again = asyncio.run(run())
    assert largest_gap(ours, expected) < WORST
    clips = Counter(g.group.prompt.clip.video_path for g in batches(cached_config, prompts, encoder)[0])
    passes = sum(ceil(2 * of_clip / 3) for of_clip in clips.values())  # 2 rollouts a prompt, 3 rows a pass
    assert first[0]["learner/vision_cache_hit_frac"] == pytest.approx(1 - len(clips) / passes)
    assert len(clips) < passes
    assert again["learner/vision_cache_hit_frac"] == 1.0


def suspended(group: ScoredGroup) -> ScoredGroup:
    """The same group with all its rollouts suspended."""
    return ScoredGroup(group=replace(group.group, trajectories=(), suspended=group.group.sampled), scores=())


def unreadable(group: ScoredGroup) -> ScoredGroup:
    """The same group, of a clip that is gone."""
    prompt = group.group.prompt
    prompt = replace(prompt, clip=replace(prompt.clip, video_path="/nowhere/gone.mp4"))
    return replace(group, group=replace(group.group, prompt=prompt))


@pytest.mark.parametrize(("lose", "stage"), [(suspended, 2), (unreadable, 2), (unreadable, 3)])
def test_lost_rollouts_never_scale_up_what_is_left_and_alone_they_leave_everything_as_it_was(
    learners, overrides, prompts, encoder, lose, stage
):
    """Two ranks in two micro-batches: some of them have lost one row, some all.

    Suspended ones with SCC's schedule, whose denominator does not know how many were presented.
    """
    more = SHARDED if stage == 3 else ()
    if lose is suspended:
        more = ("curriculum.kind=scc", "loss.reduction=sequence")
    config = make_config(overrides, 2, stage, "loss.kind=opd", "learner.weight_decay=0.1", *more)
    groups = scored_groups(prompts[:7], encoder, seed=0)

    async def run():
        learner = await learners(config)
        skipped = await learner.update([lose(g) for g in groups], 0)
        parameters = await parameters_of(learner, 1)
        mixed = await learner.update([*groups[:4], *map(lose, groups[4:])], 1)
        active = await (other := await learners(config)).update(groups[:4], 1)
        alone = await other.update(groups[:1], 2)
        return skipped, parameters, mixed, active.metrics, alone.metrics

    skipped, parameters, mixed, active, alone = asyncio.run(run())
    lost = [g.group.prompt.prompt_id for g in groups] if lose is unreadable else []
    assert sorted(f.prompt_id for f in skipped.failed) == sorted(lost)
    assert sorted(f.prompt_id for f in mixed.failed) == sorted(lost[4:])
    assert all("gone.mp4 is missing" in f.reason for f in mixed.failed)
    skipped, mixed = skipped.metrics, mixed.metrics
    assert skipped["learner/dropped_rows"] == len(lost) and mixed["learner/dropped_rows"] == len(lost[4:])
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    assert largest_gap(parameters, start) == 0, "no optimizer step and no weight decay"
    assert skipped["learner/skipped"] == 1.0 and skipped["learner/num_tokens"] == 0
    tokens = [len(g.group.trajectories[0].response_token_ids) for g in groups]
    share = 1.0 if lose is suspended else sum(tokens[:4]) / sum(tokens)
    assert mixed["learner/loss"] == pytest.approx(active["learner/loss"] * share, rel=1e-5)
    assert mixed["learner/grad_norm"] == pytest.approx(active["learner/grad_norm"] * share, rel=1e-4)
    assert active["learner/num_tokens"] == sum(tokens[:4]) and active["learner/dropped_rows"] == 0
    assert alone["learner/num_tokens"] == tokens[0] and alone["learner/grad_norm"] > 0, "one rank has no row"
    assert mixed["learner/num_tokens"] == sum(tokens[:4] if lose is suspended else tokens)
