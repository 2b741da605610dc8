"""DeepSpeed ranks as Ray actors against one plain torch process on the same batch."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.weight_receiver import unpack
from learner.learner import Learner
from tests.real.conftest import DEMO, scored_groups
from video_opd.config import load_config
from video_opd.modeling import ResponseLogits, collate, load_model
from video_opd.types import ScoredGroup

# Adam's first steps move a weight by about lr whatever the size of its gradient; where a gradient is almost zero,
# another order of summation changes a part of that step. Hence one bound for the worst weight and one for them all.
LR, STEPS = 1e-3, 2
WORST, RMS = 0.2 * LR, 0.002 * LR


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
            "loss.clamp=null",
            *more,
        ],
    )


def batches(prompts, encoder):
    """Seven groups a step: neither ranks nor micro-batches come out even."""
    return [scored_groups(prompts[i * 7 : i * 7 + 7], encoder, seed=i) for i in range(STEPS)]


def reference_parameters(config, prompts, encoder) -> dict[str, np.ndarray]:
    """Plain torch: the literal loss over the whole batch at once, clipped, AdamW. No code of learner/ is used."""
    model = load_model(config.student, "float32").train()
    logits_of = ResponseLogits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=config.learner.betas, weight_decay=0.0)
    for groups in batches(prompts, encoder):
        trajectories = [g.group.trajectories[0] for g in groups]
        scores: list[Any] = [g.scores[0] for g in groups]
        encoded = [encoder.encode(g.group.prompt) for g in groups]
        batch = collate(encoded, [t.response_token_ids for t in trajectories], encoder.tokenizer.pad_token_id)
        logprobs = logits_of(batch).log_softmax(-1)
        if config.loss.kind == "sampled":
            taken = logprobs[torch.arange(len(batch.targets)), batch.targets]
            actor = torch.from_numpy(np.concatenate([t.actor_logprobs for t in trajectories]))
            signal = torch.from_numpy(np.concatenate([s.teacher_logprobs for s in scores])) - actor
            loss = -((taken - actor).exp() * signal).sum()
        else:
            ids = torch.from_numpy(np.concatenate([s.top_k.ids for s in scores])).long()
            teacher = torch.from_numpy(np.concatenate([s.top_k.logprobs for s in scores]))
            student = logprobs.gather(-1, ids)
            student_tail, teacher_tail = 1 - student.exp().sum(-1), 1 - teacher.exp().sum(-1)
            loss = (student.exp() * (student - teacher)).sum() + (student_tail * (student_tail / teacher_tail).log()).sum()
        optimizer.zero_grad()
        (loss / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.learner.max_grad_norm)
        optimizer.step()
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


async def train(name, config, prompts, encoder, folder=None):
    """The learner's parameters after the same updates, as they are published; its metrics; checkpoint if asked."""
    learner = Learner(name, config)
    await learner.start()
    reports = [await learner.update(groups, step) for step, groups in enumerate(batches(prompts, encoder))]
    if folder:
        await learner.save(folder)
    references, _ = await learner.put_weights(STEPS)
    parameters = {n: t.numpy() for n, t in unpack(ray.get(references, timeout=60))}
    return learner, parameters, [r.metrics for r in reports]


def stop(learner: Learner) -> None:
    ranks: list[Any] = learner._ranks
    for rank in ranks:
        ray.kill(rank)


def largest_gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[n] - theirs[n]).max()) for n in ours)


@pytest.mark.parametrize(("world_size", "stage", "loss"), [(1, 2, "topk"), (2, 0, "sampled"), (2, 2, "topk"), (2, 3, "sampled")])
def test_ranks_compute_what_one_process_does(local_ray, overrides, prompts, encoder, world_size, stage, loss):
    config = make_config(overrides, world_size, stage, f"loss.kind={loss}")
    expected = reference_parameters(config, prompts, encoder)
    learner, parameters, metrics = asyncio.run(train(f"l{world_size}{stage}", config, prompts, encoder))
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    moved = largest_gap(parameters, start)
    assert moved > 0.5 * LR, "the updates must move the weights for the comparison to mean anything"
    assert largest_gap(parameters, expected) < WORST
    gaps = np.concatenate([(parameters[n] - expected[n]).ravel() for n in expected])
    assert np.sqrt(np.mean(np.square(gaps))) < RMS
    tokens = [sum(len(g.group.trajectories[0].response_token_ids) for g in groups) for groups in batches(prompts, encoder)]
    assert [m["learner/num_tokens"] for m in metrics] == tokens
    if stage:  # DeepSpeed reports no norm at stage 0
        assert all(m["learner/grad_norm"] > 0 for m in metrics)
    stop(learner)


def test_a_checkpoint_restores_weights_and_optimizer_exactly_and_its_student_loads(
    local_ray, overrides, prompts, encoder, tmp_path
):
    config = make_config(overrides, 2, 2, "loss.kind=topk")
    more = scored_groups(prompts[20:26], encoder, seed=9)

    async def go_on(learner):
        await learner.update(more, STEPS)
        references, _ = await learner.put_weights(STEPS + 1)
        return {n: t.numpy() for n, t in unpack(ray.get(references, timeout=60))}

    async def run():
        learner, saved, _ = await train("before", config, prompts, encoder, tmp_path)
        after = await go_on(learner)
        stop(learner)
        fresh = Learner("after", config)
        await fresh.start()
        await fresh.load(tmp_path)
        resumed = await go_on(fresh)
        stop(fresh)
        return saved, after, resumed

    saved, uninterrupted, resumed = asyncio.run(run())
    assert largest_gap(uninterrupted, saved) > 0.1 * LR
    assert largest_gap(uninterrupted, resumed) == 0
    exported = {n: p.detach().numpy() for n, p in load_model(str(tmp_path / "student"), "float32").named_parameters()}
    assert largest_gap(exported, saved) == 0


def test_a_frozen_vision_tower_keeps_its_weights(local_ray, overrides, prompts, encoder):
    config = make_config(overrides, 1, 0, "learner.freeze_vision=true", "loss.kind=sampled")
    learner, parameters, _ = asyncio.run(train("frozen", config, prompts, encoder))
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    vision = [n for n in start if n.startswith("model.visual.")]
    assert len(vision) > 10
    assert all((parameters[n] == start[n]).all() for n in vision)
    assert any((parameters[n] != start[n]).any() for n in start if n not in vision)
    stop(learner)


def suspended(group: ScoredGroup) -> ScoredGroup:
    """The same group with all its rollouts suspended."""
    return ScoredGroup(group=replace(group.group, trajectories=(), suspended=group.group.sampled), scores=())


def test_suspended_rollouts_never_scale_up_what_is_left_and_alone_they_leave_everything_as_it_was(
    local_ray, overrides, prompts, encoder
):
    config = make_config(overrides, 2, 2, "loss.kind=sampled", "learner.weight_decay=0.1")
    groups = scored_groups(prompts[:7], encoder, seed=0)

    async def run():
        learner = Learner("suspended", config)
        await learner.start()
        skipped = await learner.update([suspended(g) for g in groups], 0)
        references, _ = await learner.put_weights(1)
        parameters = {n: t.numpy().copy() for n, t in unpack(ray.get(references, timeout=60))}
        mixed = await learner.update([*groups[:4], *map(suspended, groups[4:])], 1)
        stop(learner)
        whole = Learner("active", config)
        await whole.start()
        active = await whole.update(groups[:4], 1)
        stop(whole)
        return skipped.metrics, parameters, mixed.metrics, active.metrics

    skipped, parameters, mixed, active = asyncio.run(run())
    start = {n: p.detach().numpy() for n, p in load_model(config.student, "float32").named_parameters()}
    assert largest_gap(parameters, start) == 0, "no optimizer step and no weight decay"
    assert skipped["learner/skipped"] == 1.0 and skipped["learner/num_tokens"] == 0
    tokens = [len(g.group.trajectories[0].response_token_ids) for g in groups]
    share = sum(tokens[:4]) / sum(tokens)
    assert mixed["learner/loss"] == pytest.approx(active["learner/loss"] * share, rel=1e-5)
    assert mixed["learner/grad_norm"] == pytest.approx(active["learner/grad_norm"] * share, rel=1e-4)
    assert mixed["learner/num_tokens"] == active["learner/num_tokens"] == sum(tokens[:4])
