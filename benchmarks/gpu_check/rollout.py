"""vLLM as the rollout actors run it."""

from collections.abc import Sequence

import numpy as np
import torch

from actors.engine import PolicyEngine
from benchmarks.command import timed
from benchmarks.gpu_check.measure import NOTICED, Arrays, Setting, check_memory, gap, planned, within
from benchmarks.gpu_check.part import Bench, CheckError
from video_opd.models.forward import ResponseLogits, collate
from video_opd.models.policy import score_by_policy
from video_opd.models.vllm_engine import Completion, vllm_prompt
from video_opd.types import EncodedPrompt
from video_opd.weights.buckets import to_buckets

PERTURBED = 0.3  # of a weight's deviation
PAD_LOGIT = 20.0  # above all others
NUM_BANNED_ANSWERS = 4


class Checks(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)

    def start(self) -> str:
        """On vLLM's second model runner, on a GPU with CUDA graphs."""
        self._engine = PolicyEngine(self.config, self.encoder.pad_ids)
        settings = self._engine._llm.llm_engine.vllm_config
        if not settings.use_v2_model_runner:
            raise CheckError("vLLM uses its first model runner")
        graphs = settings.compilation_config.cudagraph_mode.name
        if self.bench.device == "cuda" and graphs == "NONE":
            raise CheckError("vLLM uses no CUDA graphs")
        return (
            f"second model runner, CUDA graphs {graphs}, prompts of {len(self.encoded[0].token_ids)} tokens"
        )

    def sampling(self) -> str:
        """A seed gives the same tokens again, another one others. Compared with equally full caches."""
        cold_s, self._cold = timed(self._sample, 1)
        warm_s, self._warm = timed(self._sample, 1)
        again, other = self._sample(1), self._sample(2)
        first, second, third = ([c.token_ids.tolist() for c in of] for of in (self._warm, again, other))
        if first != second:
            raise CheckError("one seed gave two answers")
        if first == third:
            raise CheckError("two seeds gave one answer")
        told = planned(self.config, lambda plan: plan.student_answers_s(plan.train, len(first)))
        return (
            f"{len(first)} prompts in {cold_s:.2f} s ({told}), with their prefixes cached in {warm_s:.2f} s"
        )

    def memory(self) -> str:
        return check_memory(self.config, "actors")

    def log_probs(self) -> str:
        """With an empty and a full prefix cache."""
        self._model = self.float32_model()
        answers, encoded = self._cold + self._warm, self.encoded * 2
        exact = self._exact(answers, encoded)
        grey = [self.encoder.encode(p, blank_video=True) for p in self.prompts] * 2
        seen = gap(self._exact(answers, grey), exact)
        if seen < NOTICED * self.tolerance:
            raise CheckError(f"grey frames change log-probs by {seen:.2g} only: a wrong video would pass")
        told = within([a.logprobs for a in answers], exact, self.tolerance)
        return f"{told}; grey frames change them by {seen:.2g}"

    def reload(self) -> str:
        """Would fail without new weights, or with what either cache holds of the old ones."""
        with torch.no_grad():
            for weight in self._model.parameters():
                if weight.ndim > 1:
                    weight.add_(PERTURBED * weight.std() * torch.randn_like(weight))
        self._round()
        if (before := self._gap(3)) < NOTICED * self.tolerance:
            raise CheckError(f"the new weights change log-probs by {before:.2g} only: old ones would pass")
        seconds, num_bytes = timed(self._publish, 1)
        told = f"{num_bytes / 1e9:.2f} GB in {seconds:.2f} s"
        if (after := self._gap(4)) > self.tolerance:
            raise CheckError(f"{told}; log-probs {after:.2g} from float32's, allowed {self.tolerance:g}")
        return f"{told}; log-probs at most {before:.2g} from float32's before, {after:.2g} after"

    @torch.no_grad()
    def banned_tokens(self) -> str:
        """By weights that want nothing but the banned tokens."""
        prompt, pads = self.encoded[0], list(self.encoder.pad_ids)
        batch = collate([prompt], [np.zeros(1, np.int32)], 0, self.bench.device)
        hidden = ResponseLogits(self._model).hidden(batch)[0]
        self._model.get_output_embeddings().weight[pads] = PAD_LOGIT * hidden / hidden.square().sum()
        self._round()
        wanted = ResponseLogits(self._model)(batch)[0].softmax(-1)[pads].sum().item()
        if wanted < 0.9:
            raise CheckError(f"the banned tokens' probability is {wanted:.2f} only: no ban would pass")
        self._publish(2)
        (answers,) = self._engine.generate([prompt], [0], NUM_BANNED_ANSWERS)
        tokens = np.concatenate([a.token_ids for a in answers])
        if np.isin(tokens, pads).any():
            raise CheckError("a banned token was sampled")
        exact = self._exact(answers, [prompt] * len(answers))
        told = within([a.logprobs for a in answers], exact, self.tolerance)
        return f"none of {len(tokens)} tokens, against a probability of {wanted:.2f}; {told}"

    def given_tokens(self) -> str:
        """vLLM's prompt_logprob_token_ids: the head on response rows alone, prompts from the prefix cache.

        vLLM leaves out all scores of a prompt whose last token is cached too, at the end of a block.
        """
        from vllm import SamplingParams

        self._sample(5)  # fills the cache
        how = self.config.rollout.temperature, self.encoder.pad_ids
        self._engine._llm.collective_rpc(score_by_policy, args=how)
        block = self._engine._llm.llm_engine.vllm_config.cache_config.block_size
        responses = self.random_responses()
        pairs = list(zip(self.encoded, responses, strict=True))
        parameters = [
            SamplingParams(
                max_tokens=1,
                detokenize=False,
                skip_reading_prefix_cache=len(prompt.token_ids) % block == 0,
                prompt_logprob_start=len(prompt.token_ids) - 1,
                prompt_logprob_token_ids=response[:, None].tolist(),
            )
            for prompt, response in pairs
        ]
        inputs = [vllm_prompt(prompt, response) for prompt, response in pairs]
        seconds, outputs = timed(lambda: self._engine._llm.generate(inputs, parameters, use_tqdm=False))
        found = [output.prompt_token_id_logprobs for output in outputs]
        if any(scores is None for scores in found):
            raise CheckError("vLLM left out the scores of a prompt")
        if not (cached := max(output.num_cached_tokens for output in outputs)):
            raise CheckError("vLLM did not use its prefix cache")
        told = within(
            [s[:, 0] for s in found], self.exact(self._model, self.encoded, responses), self.tolerance
        )
        return f"{told}; in {seconds:.2f} s with up to {cached} tokens of a prompt cached"

    def _sample(self, seed: int) -> list[Completion]:
        return [answer for (answer,) in self._engine.generate(self.encoded, [seed] * len(self.encoded))]

    def _exact(self, answers: Sequence[Completion], encoded: Sequence[EncodedPrompt]) -> Arrays:
        return self.exact(self._model, encoded, [a.token_ids for a in answers])

    def _gap(self, seed: int) -> float:
        answers = self._sample(seed)
        return gap([a.logprobs for a in answers], self._exact(answers, self.encoded))

    @torch.no_grad()
    def _round(self) -> None:
        """Leaves the reference the values that a publication carries."""
        for weight in self._model.parameters():
            weight.copy_(weight.to(getattr(torch, self.bench.dtype)))

    def _publish(self, version: int) -> int:
        """As an actor gets them from the object store; returns bytes."""
        dtype = getattr(torch, self.bench.dtype)
        named = ((n, p.detach().to("cpu", dtype)) for n, p in self._model.named_parameters())
        buckets = list(to_buckets(named, version, self.config.learner.bucket_bytes))
        self._engine.load_weights(version, buckets)
        return sum(bucket.num_bytes for bucket in buckets)
