"""One optimizer step of a ZeRO-3 rank with gradient checkpointing against a plain step in float32."""

import socket

import numpy as np
import torch

from benchmarks.gpu_check.measure import Arrays, Setting, check_memory, release, within_share
from benchmarks.gpu_check.stage import Bench, CheckError
from learner.adapters import choose_trained
from learner.engine import LearnerEngine
from learner.loss import sampled_loss
from video_opd.models.forward import ResponseLogits, collate, load_model, token_logprobs
from video_opd.types import FinishReason, ScoredGroup, TeacherScores, Trajectory, TrajectoryGroup

LOSS_SHARE = {"float32": 1e-3, "bfloat16": 0.02}
GRADIENT_SHARE = {"float32": 1e-3, "bfloat16": 0.05}
MOVED_SHARE = 0.1  # Adam's first step moves a weight by the learning rate, whatever its gradient


class Stage(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)
        self._responses = self.random_responses()

    def reference(self) -> str:
        """Loss and gradient over all responses, each in a pass of its own, without checkpointing."""
        model = self.float32_model()
        actor = self.exact(model, self._responses)
        advantages = [np.random.default_rng(i).uniform(0.5, 1.5, len(a)) for i, a in enumerate(actor)]
        self._groups = made_up_groups(self, self._responses, actor, advantages)
        choose_trained(model, self.config.learner)
        num_tokens, self._loss = sum(map(len, actor)), 0.0
        for prompt, response, old, advantage in zip(self.encoded, self._responses, actor, advantages, strict=True):
            batch = collate([prompt], [response], self.encoder.tokenizer.pad_token_id, self.bench.device)
            new = token_logprobs(ResponseLogits(model)(batch), batch.targets)
            values = (torch.tensor(v, dtype=torch.float32, device=self.bench.device) for v in (old, advantage))
            loss = sampled_loss(new, *values).sum() / num_tokens
            loss.backward()
            self._loss += loss.item()
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        self._gradient = torch.stack(gradients).norm().item()
        del model, gradients, loss, new
        release()
        return f"loss {self._loss:.4f}, gradient {self._gradient:.4f}"

    def step(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._engine = LearnerEngine(self.config, 0, 1, ("127.0.0.1", port))
        metrics, failed = self._engine.update(self._groups, 0)
        if failed:
            raise CheckError(f"clips failed: {failed[0].reason}")
        told = within_share(metrics["learner/loss"], self._loss, LOSS_SHARE[self.bench.dtype], "loss")
        share = GRADIENT_SHARE[self.bench.dtype]
        return f"{told}; {within_share(metrics['learner/grad_norm'], self._gradient, share, 'gradient')}"

    def weights(self) -> str:
        """Trained weights moved by the learning rate, frozen ones not at all."""
        before = dict(load_model(self.config.student, self.bench.dtype).named_parameters())
        moved = []
        for name, weight in self._engine.parameters("cpu"):
            steps = (weight.float() - before[name].float()).abs()
            if name.startswith("model.visual.") and steps.any():
                raise CheckError(f"{name} is frozen and moved")
            if name.endswith("q_proj.weight"):
                moved.append(steps.median().item())
        return within_share(float(np.median(moved)), self.config.learner.lr, MOVED_SHARE, "median move")

    def memory(self) -> str:
        return check_memory(self.config, "learner")


def made_up_groups(of: Setting, responses: Arrays, actor: Arrays, advantages: Arrays) -> list[ScoredGroup]:
    """Rollouts with these responses, their log-probs, and teacher's that give the advantages."""
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
            predicted_span_s=None,
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
