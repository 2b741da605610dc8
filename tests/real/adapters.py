"""A learner's model with adapters, and an actor beside it."""

import numpy as np
import torch

from actors.engine import PolicyEngine
from learner.adapters import adapter_parameters, choose_trained
from video_opd.config import Config
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, load_model, token_logprobs
from video_opd.models.policy import Policy
from video_opd.types import EncodedPrompt
from video_opd.weights.buckets import WeightBucket, to_buckets

LORA = ("learner.lora_rank=5", "learner.lora_alpha=8")  # in vLLM's slots of rank 8; no power of 2 as a scale


@torch.no_grad()
def adapted(config: Config, dtype: str, b: float, seed: int) -> VideoLLM:
    """The learner's model, with adapters whose B is of about size b."""
    torch.manual_seed(seed)
    model = load_model(config.student, dtype).eval()
    choose_trained(model, config.learner)
    for name, parameter in adapter_parameters(model):
        if ".lora_B." in name:
            parameter.normal_(0, b)
    return model


def published(model: VideoLLM, version: int, config: Config) -> list[WeightBucket]:
    named = [(n, p.detach()) for n, p in adapter_parameters(model)]
    return list(to_buckets(named, version, config.learner.bucket_bytes))


@torch.no_grad()
def gaps(engine: PolicyEngine, models: list[VideoLLM], encoded: list[EncodedPrompt]) -> np.ndarray:
    """float[models, tokens]: |actor's log-prob - the model's| of each token that the actor samples."""
    found = []
    for prompt, (answer,) in zip(encoded, engine.generate(encoded, [7] * len(encoded)), strict=True):
        batch = collate([prompt], [answer.token_ids], 0)
        policy = Policy(1.0, list(engine._banned), "cpu")
        exact = [token_logprobs(policy(ResponseLogits(m)(batch)), batch.targets).numpy() for m in models]
        found.append(np.abs(np.stack(exact) - answer.logprobs))
    return np.concatenate(found, axis=1)
