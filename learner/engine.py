"""One rank of the learner: DeepSpeed around the student."""

import importlib
import math
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from learner.adapters import (
    Parts,
    adapter_parameters,
    checkpoint_layers,
    choose_trained,
    merge,
    merged_parameters,
)
from learner.batching import Row, plan_update
from learner.deepspeed_config import deepspeed_config
from learner.diagnostics import TimestampTokens, TokenRecords, batch_diagnostics, policy_diagnostics
from learner.encoding import EncodedRows, encoded_rows
from learner.export import write_student
from learner.loading import load_student
from learner.loss import ResponseTokens, is_unsure, loss_per_token
from learner.safe_load import read_weights_only
from learner.saving import taken_to_the_end, writing_on_all_ranks
from learner.universal import TAG as universal_tag
from learner.vision_cache import VisionCache
from video_opd.config import Config
from video_opd.hub import on_this_node
from video_opd.models.forward import (
    ResponseBatch,
    ResponseLoss,
    VideoLLM,
    collate,
    load_head,
    token_entropy,
)
from video_opd.models.policy import Policy
from video_opd.models.prompting import PromptEncoder
from video_opd.types import FailedPrompt, ScoredGroup
from video_opd.weights.adapters import write_adapter
from video_opd.weights.buckets import Named, WeightBucket, to_buckets

Runs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # states[R, H], head[V, H]
PATIENCE = timedelta(days=1)  # of ranks for a slower one: the driver's deadlines end a wait, not NCCL's


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over warmup_frac of the run, then decay to final_lr_frac of the peak.

    lr_decay=cosine: half a cosine wave, as transformers' schedule of that name, which ends at 0.
    """
    learner = config.learner
    warmup = learner.warmup_frac * config.num_steps
    if step < warmup:
        return learner.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, config.num_steps - warmup)
    if learner.lr_decay == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2
    return learner.lr * (1.0 - (1.0 - learner.final_lr_frac) * done)


class LearnerEngine:
    """Holds the student under DeepSpeed ZeRO. Every method is called on all ranks with the same arguments."""

    def __init__(self, config: Config, rank: int, world_size: int, master: tuple[str, int]):
        self._base = config.student
        config = on_this_node(config, teachers=config.loss.needs.teacher == "hidden")
        self._config, self._rank, self._world_size = config, rank, world_size
        learner = config.learner
        self._deepspeed = _init_deepspeed(config, rank, world_size, master)
        self._encoder = PromptEncoder(config.student, config.prompt, config.video, config.trust_remote_code)
        self._device = "cuda" if learner.num_gpus else "cpu"
        self._policy = Policy(config.learner_temperature, self._encoder.pad_ids, self._device)
        # ZeRO keeps float32 masters of bfloat16 weights
        model = load_student(config)
        if learner.lora_rank:
            torch.manual_seed(config.seed)  # every rank draws the same adapters
        choose_trained(model, learner)
        if learner.gradient_checkpointing:
            checkpoint_layers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, learner.lr, learner.betas, weight_decay=learner.weight_decay)
        module = ResponseLoss(model, learner.logit_rows)
        self._teacher_heads: dict[str, torch.Tensor] = {}  # by teacher id
        if config.loss.needs.teacher == "hidden":
            dtype, teachers = config.teacher_pool.dtype, config.teacher_models
            heads = {t.name: load_head(t.model, dtype).to(self._device) for t in teachers}
            shared = min(len(head) for head in heads.values())  # the rest are padded embeddings
            self._teacher_heads = {name: head[:shared] for name, head in heads.items()}
        _import_without_compiler()
        options: dict[str, Any] = {"optimizer": optimizer, "config": deepspeed_config(learner)}
        self._engine: Any = self._deepspeed.initialize(model=module, **options)[0]
        self._is_time = TimestampTokens(self._encoder.tokenizer)
        self._vision = VisionCache.of(self._model, learner)

    @property
    def _model(self) -> VideoLLM:
        return self._engine.module.model

    def update(
        self, groups: Sequence[ScoredGroup], step: int, baseline: float | None = None
    ) -> tuple[dict[str, float], list[FailedPrompt]]:
        """One optimizer step; none, and no weight decay, if every rollout is suspended or unreadable.

        Returns metrics, the same on every rank, and the prompts whose clips this rank could not read.
        """
        config, engine = self._config, self._engine
        tokens = self._encoder.token_ids, self._encoder.pad_ids[0]
        room = config.schedule_room
        num_sequences = room.num_sequences(step) if room else None
        plan = plan_update(groups, config.loss, config.learner, self._rank, *tokens, num_sequences, baseline)
        if not plan.micro_batches:
            return _skipped(0), []
        lr = learning_rate(step, config)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        self._model.train()
        # DeepSpeed averages gradients over ranks; the loss needs their sum over one global denominator.
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        computed = 0  # tokens
        records: list[torch.Tensor] = []  # fetched at the end: nothing waits for the device meanwhile
        failed: list[FailedPrompt] = []  # one for each dropped row
        num_trained = num_dropped = 0
        micro_batches = encoded_rows(self._encoder, plan.micro_batches)
        for i, (batch, most_tokens) in enumerate(zip(micro_batches, plan.most_tokens, strict=True)):
            is_last = i == len(plan.micro_batches) - 1
            failed += batch.failed
            num_trained += sum(row.weight > 0 for row in batch.rows)
            if is_last:
                num_trained, num_dropped = self._over_ranks(num_trained, len(failed))
                if not num_trained:  # gradients so far are zeros
                    return _skipped(num_dropped), failed
            engine.set_gradient_accumulation_boundary(is_last)
            packed = self._collate(batch)
            computed += sum(tree.num_tokens for tree in packed.trees)
            loss, of_tokens = self._loss_sum(batch.rows, packed, most_tokens)
            engine.backward(loss * (self._world_size / plan.denominator))
            engine.step()
            total += loss.detach()
            records.append(of_tokens)
        separate = sum(len(row.token_ids) for rows in plan.micro_batches for row in rows if row.weight)
        computed, separate = self._over_ranks(computed, separate)
        if self._world_size > 1:
            torch.distributed.all_reduce(total)
        *of_tokens, weights = torch.cat(records, dim=1).cpu().numpy()
        mine = TokenRecords(*(values[weights > 0] for values in of_tokens))
        metrics = {
            "learner/loss": float(total) / plan.denominator,
            "learner/grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "learner/lr": lr,
            "learner/skipped": 0.0,
            "learner/dropped_rows": float(num_dropped),
            "learner/computed_tokens": float(computed),
            "learner/separate_tokens": float(separate),
            **policy_diagnostics(TokenRecords.of_all_ranks([mine], self._world_size), config.loss),
            **batch_diagnostics(groups, config, self._is_time, baseline),
            **(self._vision.take_metrics() if self._vision and config.learner.vision_cache_bytes else {}),
        }
        return metrics, failed

    def _over_ranks(self, *counts: int) -> list[int]:
        """Their sums over all ranks."""
        sums = torch.tensor(counts, device=self._device)
        if self._world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()

    def _collate(self, batch: EncodedRows) -> ResponseBatch:
        """The packed trees of a micro-batch, with the tower's features where they are kept."""
        responses = [row.trajectory.response_token_ids for row in batch.rows]
        pad_id, vision = self._encoder.tokenizer.pad_token_id, self._vision
        packed = collate(batch.prompts, responses, pad_id, self._device, with_pixels=vision is None)
        if vision is None:
            return packed
        shown = [batch.prompts[i] for i in packed.clips]
        return replace(packed, video_features=vision.features(shown, packed.video_grid_thw, batch.kept))

    def _loss_sum(
        self, rows: list[Row], batch: ResponseBatch, most_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of a micro-batch; float32[5, tokens]: TokenRecords, and the tokens' weights."""
        tokens = self._response_tokens(rows, batch.targets)

        def loss(logits: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
            logits = self._policy(logits)
            return *loss_per_token(self._config.loss, logits, tokens, which), token_entropy(logits.detach())

        per_token, learner, entropy = self._engine(batch, loss, most_tokens)
        weights = self._per_token(rows, [row.weight for row in rows])
        shown = (
            torch.zeros_like(weights) if tokens.is_demonstration is None else tokens.is_demonstration.float()
        )
        records = torch.stack([learner, tokens.actor_logprobs, entropy, shown, weights])
        return (per_token * weights).sum(), records

    def _response_tokens(self, rows: list[Row], targets: torch.Tensor) -> ResponseTokens:
        top_k = teacher_logits = None
        scores = [row.scores for row in rows if row.scores is not None]
        if self._config.loss.needs.teacher == "top_k":
            top = [s.top_k for s in scores if s.top_k is not None]
            top_k = (self._tensor([t.ids for t in top]).long(), self._tensor([t.logprobs for t in top]))
        unsure = is_unsure(scores, self._config.loss)
        if self._teacher_heads:
            runs = [
                (self._tensor([s.hidden for s in run if s.hidden is not None]), self._teacher_heads[name])
                for name, run in groupby(scores, key=lambda s: s.teacher_id)
            ]
            teacher_logits = partial(self._teacher_logits, runs)
        shown = self._per_token(rows, [row.trajectory.is_demonstration for row in rows])
        return ResponseTokens(
            targets=targets,
            actor_logprobs=self._tensor([row.trajectory.actor_logprobs for row in rows]),
            advantage=self._tensor([row.signal.advantage for row in rows]),
            distill=self._tensor([row.signal.distill for row in rows]),
            is_demonstration=shown.bool() if self._config.loss.on_policy_frac < 1 else None,
            teacher_logprobs=self._tensor([s.teacher_logprobs for s in scores]) if scores else None,
            top_k=top_k,
            teacher_logits=teacher_logits,
            is_forward=None if unsure is None else self._tensor([unsure]),
        )

    def _teacher_logits(self, runs: Runs, which: slice) -> torch.Tensor:
        return self._policy(rows_of(runs, which))

    def _per_token(self, rows: list[Row], values: Sequence[float]) -> torch.Tensor:
        """float32[tokens]: each row's value at its response tokens."""
        lengths = [len(row.signal.advantage) for row in rows]
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(self._device)

    def _tensor(self, arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self._device)

    def parameters(self, alone_on: str | None = None) -> Named:
        """Of the plain model: whole, adapters merged, on the rank's device. All ranks must iterate.

        alone_on: for rank 0 alone, on that device. The other ranks help it to gather, and get none.
        """
        return self._gathered(merged_parameters(self._model), alone_on)

    def adapters(self, alone_on: str) -> Named:
        """A and B of the adapters as the forward pass has them; as `parameters`."""
        return self._gathered(((name, [p], 1.0) for name, p in adapter_parameters(self._model)), alone_on)

    def _gathered(self, named: Iterable[Parts], alone_on: str | None) -> Named:
        is_sharded, device = self._config.learner.zero_stage == 3, alone_on or self._device
        for name, parts, scaling in named:
            with self._deepspeed.zero.GatheredParameters(parts, enabled=is_sharded):
                if alone_on and self._rank:
                    continue
                tensor = merge(parts, scaling).to(device=device, copy=is_sharded)
            yield name, tensor

    def buckets(self, policy_version: int) -> Iterator[WeightBucket]:
        """What actors get of the student: rank 0 gets it, for publication. All ranks must iterate."""
        learner = self._config.learner
        named = self.adapters if learner.publishes_adapters else self.parameters
        with taken_to_the_end(named(alone_on=self._device)) as tensors:
            yield from to_buckets(tensors, policy_version, learner.bucket_bytes)

    def save(self, folder: Path) -> None:
        """Writes the DeepSpeed state, `student/`, a transformers folder, and with LoRA `adapter/`, PEFT's.

        Raises OSError on all ranks.
        """
        with writing_on_all_ranks(self._engine, folder / "deepspeed" / "state"):
            self._engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)
        self.export(folder / "student")
        if self._config.learner.lora_rank:
            adapters = dict(self.adapters(alone_on="cpu"))
            if self._rank == 0:
                write_adapter(folder / "adapter", adapters, self._config.learner, self._base)

    def export(self, folder: Path) -> None:
        """Rank 0 writes the student alone, for transformers and vLLM."""
        with taken_to_the_end(self.parameters(alone_on="cpu")) as named:
            if self._rank == 0:
                write_student(self._model, named, self._config.student, folder)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Restores weights and optimizer exactly, from a checkpoint of as many ranks or a universal one."""
        self._engine._config.load_universal_checkpoint = universal  # DeepSpeed reads it only while it loads
        if self._config.learner.zero_stage == 3 and not universal:
            self._engine.optimizer.optimizer.state.clear()  # else torch has them beside those that it reads
        where, tag = (folder, universal_tag) if universal else (folder / "deepspeed", "state")
        path, _ = self._engine.load_checkpoint(str(where), tag=tag)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"


def _skipped(num_dropped: int) -> dict[str, float]:
    """The metrics of an update that trained on nothing."""
    zeros = dict.fromkeys(("learner/loss", "learner/grad_norm", "learner/num_tokens"), 0.0)
    return zeros | {"learner/skipped": 1.0, "learner/dropped_rows": float(num_dropped)}


def rows_of(runs: Runs, which: slice) -> torch.Tensor:
    """float32[rows, V]: logits of rows `which` of the concatenated runs."""
    logits, first = [], 0
    for states, head in runs:
        rows = states[max(which.start - first, 0) : max(which.stop - first, 0)]
        first += len(states)
        logits.append(rows.to(head.dtype).matmul(head.T).float())
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def _import_without_compiler() -> None:
    """DeepSpeed compiles functions of an optimizer that is not used here: 1.7 s of CPU time, and 57 MiB."""
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def _init_deepspeed(config: Config, rank: int, world_size: int, master: tuple[str, int]):
    on_gpu = bool(config.learner.num_gpus)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # Ray shows each rank its own GPU alone
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=master[0],
        MASTER_PORT=str(master[1]),
        **({} if on_gpu else {"DS_ACCELERATOR": "cpu"}),
    )
    import deepspeed

    if not on_gpu:  # its shared-memory extension compiles for a minute, and a killed build hangs later runs
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None
    read_weights_only()
    backend = "nccl" if on_gpu else "gloo"
    listening = None
    if rank == 0:  # torch's store listens on that address alone
        family, *_ = socket.getaddrinfo(*master, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(master, family=family).detach()
    store = TCPStore(*master, world_size, is_master=rank == 0, master_listen_fd=listening)
    store.set_timeout(PATIENCE)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE
    )
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # finds that group
    return deepspeed
