"""One step of a ZeRO-3 rank with gradient checkpointing against a plain one in float32."""

import socket

import numpy as np
import torch

from benchmarks.command import timed
from benchmarks.gpu_check.measure import Arrays, Setting, check_memory, planned, release, within_share
from benchmarks.gpu_check.part import Bench, CheckError
from benchmarks.gpu_check.tree import compare
from learner.adapters import choose_trained
from learner.engine import LearnerEngine
from learner.loss import sampled_loss
from video_opd.models.forward import ResponseLogits, collate, load_model, token_logprobs
from video_opd.types import FinishReason, ScoredGroup, TeacherScores, Trajectory, TrajectoryGroup

LOSS_SHARE = {"float32": 1e-3, "bfloat16": 0.02}
GRADIENT_SHARE = {"float32": 1e-3, "bfloat16": 0.05}
MOVE_SHARE = 0.1


class Checks(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)
        self._responses = self.random_responses()

    def reference(self) -> str:
        """Loss and gradient of the batch, one response a pass, without checkpointing."""
        self._model = model = self.float32_model()
        actor = self.exact(model, self.encoded, self._responses)
        advantages = [np.random.default_rng(i).uniform(0.5, 1.5, len(a)) for i, a in enumerate(actor)]
        self._groups = made_up_groups(self, self._responses, actor, advantages)
        choose_trained(model, self.config.learner)
        self._loss = 0.0
        rows = zip(self.encoded, self._responses, actor, advantages, strict=True)
        for prompt, response, old, advantage in rows:
            batch = collate([prompt], [response], self.encoder.tokenizer.pad_token_id, self.bench.device)
            new = token_logprobs(self.policy(ResponseLogits(model)(batch)), batch.targets)
            of_tokens = torch.tensor(np.stack([old, advantage]), dtype=torch.float32, device=new.device)
            loss = sampled_loss(new, of_tokens[0], of_tokens[1]).sum() / sum(map(len, actor))
            loss.backward()
            self._loss += loss.item()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        self._gradient = torch.stack(norms).norm().item()
        return f"loss {self._loss:.4f}, norm of the gradient {self._gradient:.4f}"

    def tree(self) -> str:
        """Three sequences of a clip in one pass, in both dtypes, with gradients."""
        told = [compare(self, self._model, "float32", trains=True)]
        self._model = load_model(self.config.student, "bfloat16").to(self.bench.device)
        choose_trained(self._model, self.config.learner)
        return "; ".join([*told, compare(self, self._model, "bfloat16", trains=True)])

    def step(self) -> str:
        self._model = None
        release()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        self._engine = LearnerEngine(self.config, 0, 1, address)
        seconds, (metrics, failed) = timed(self._engine.update, self._groups, 0)
        if failed:
            raise CheckError(f"a clip could not be read: {failed[0].reason}")
        loss, norm, dtype = metrics["learner/loss"], metrics["learner/grad_norm"], self.bench.dtype
        told = within_share("loss", loss, self._loss, LOSS_SHARE[dtype])
        told += f"; {within_share('norm of the gradient', norm, self._gradient, GRADIENT_SHARE[dtype])}"
        how_long = planned(self.config, lambda plan: plan.phases["update"].seconds)
        return f"{told}; {len(self._groups)} responses in {seconds:.2f} s ({how_long})"

    def weights(self) -> str:
        """Adam's first step moves a trained weight by the learning rate; a frozen one stays."""
        before = dict(load_model(self.config.student, self.bench.dtype).named_parameters())
        moves = []
        for name, weight in self._engine.parameters(alone_on="cpu"):
            move = (weight.float() - before[name].float()).abs()
            if name.startswith("model.visual.") and move.any():
                raise CheckError(f"{name} is frozen and has moved")
            if name.endswith("q_proj.weight"):
                moves.append(move.median().item())
        return within_share("median move", float(np.median(moves)), self.config.learner.lr, MOVE_SHARE)

    def memory(self) -> str:
        return check_memory(self.config, "learner")


def made_up_groups(of: Setting, responses: Arrays, actor: Arrays, advantages: Arrays) -> list[ScoredGroup]:
    """A rollout of each prompt: its response, the actor's log-probs, the teacher's for the advantages."""
    groups = []
    rows = zip(of.prompts, of.encoded, responses, actor, advantages, strict=True)
    for prompt, encoded, response, old, advantage in rows:
        trajectory = Trajectory(
            trajectory_id=f"{prompt.prompt_id}@0#0",
            prompt_id=prompt.prompt_id,
            policy_version=0,
            prompt_token_ids=encoded.token_ids,
            prompt_fingerprint=encoded.fingerprint,
            response_token_ids=response,
            actor_logprobs=old,
            finish_reason=FinishReason.LENGTH,
            text="",
            predicted_spans_s=(),
        )
        scores = TeacherScores(
            trajectory_id=trajectory.trajectory_id,
            teacher_id="teacher",
            teacher_logprobs=(old + advantage).astype(np.float32),
            top_k=None,
        )
        group = TrajectoryGroup(prompt=prompt, trajectories=(trajectory,))
        groups.append(ScoredGroup(group=group, scores=(scores,)))
    return groups
