"""vLLM as rollout actors run it: sampling, bans, seeds, publication, memory."""

import numpy as np
import torch

from actors.engine import PolicyEngine
from benchmarks.gpu_check.measure import Setting, check_memory, gap, within
from benchmarks.gpu_check.stage import Bench, CheckError
from video_opd.models.forward import ResponseLogits, collate
from video_opd.models.vllm_engine import vllm_prompt
from video_opd.weights.buckets import to_buckets

PAD_LOGIT = 20.0  # far above all others
NUM_BANNED_ANSWERS = 4
BAN_SHIFT = 1.0  # a ban would move log-probs by far more


class Stage(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)

    def start(self) -> str:
        self._engine = PolicyEngine(self.config, self.encoder.pad_ids)
        settings = self._engine._llm.llm_engine.vllm_config
        if not settings.use_v2_model_runner:
            raise CheckError("vLLM uses its first model runner")
        graphs = settings.compilation_config.cudagraph_mode.name
        if self.bench.device == "cuda" and graphs == "NONE":
            raise CheckError("vLLM uses no CUDA graphs")
        return f"second model runner, CUDA graphs {graphs}, prompts of {len(self.encoded[0].token_ids)} tokens"

    def seeds(self) -> str:
        """The first call fills the prefix cache; only calls that find the same there are compared."""
        self._cold, self._warm, again = (self._sample(seed) for seed in (1, 1, 1))
        other = self._sample(2)
        tokens = [[c.token_ids.tolist() for c in answers] for answers in (self._warm, again, other)]
        if tokens[0] != tokens[1]:
            raise CheckError("one seed gave two answers")
        if tokens[0] == tokens[2]:
            raise CheckError("two seeds gave one answer")
        return f"{len(tokens[0])} prompts, {sum(map(len, tokens[0]))} tokens"

    def memory(self) -> str:
        return check_memory(self.config, "actors")

    def log_probs(self) -> str:
        self._model = self.float32_model()
        found = self._cold + self._warm
        responses = [c.token_ids for c in found]
        exact = self.reference_of(responses, self.encoded * 2)
        grey = [self.encoder.encode(p, blank_video=True) for p in self.prompts] * 2
        seen = gap(self.reference_of(responses, grey), exact)
        if seen < 5 * self.tolerance:
            raise CheckError(f"grey frames change log-probs by {seen:.2g} only: this would not notice a wrong video")
        told = within([c.logprobs for c in found], exact, self.tolerance, "log-probs")
        return f"{told}; grey frames change them by {seen:.2g}"

    def reload(self) -> str:
        """Without a reset of the prefix cache or the encoder's, the new log-probs would be wrong."""
        with torch.no_grad():
            for weight in self._model.parameters():
                weight.add_(0.3 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else 0.0)
        self._round()
        if (before := self._gap(3)) < 5 * self.tolerance:
            raise CheckError(f"the new weights change log-probs by {before:.2g} only")
        num_bytes = self._publish(1)
        after = self._gap(4)
        told = f"{num_bytes / 1e9:.2f} GB; at most {before:.2g} from float32 before, {after:.2g} after"
        if after > self.tolerance:
            raise CheckError(f"{told}, allowed {self.tolerance:g}")
        return told

    @torch.no_grad()
    def banned_tokens(self) -> str:
        """Weights that want nothing but the banned tokens."""
        prompt, pads = self.encoded[0], list(self.encoder.pad_ids)
        batch = collate([prompt], [np.zeros(1, np.int32)], 0, self.bench.device)
        hidden = ResponseLogits(self._model).hidden(batch)[0]
        self._model.get_output_embeddings().weight[pads] = PAD_LOGIT * hidden / hidden.square().sum()
        self._round()
        wanted = ResponseLogits(self._model)(batch)[0].softmax(-1)[pads].sum().item()
        if wanted < 0.9:
            raise CheckError(f"the model gives banned tokens a probability of {wanted:.2f} only")
        self._publish(2)
        (answers,) = self._engine.generate([prompt], [list(range(NUM_BANNED_ANSWERS))])
        tokens = np.concatenate([c.token_ids for c in answers])
        if np.isin(tokens, pads).any():
            raise CheckError("a banned token was sampled")
        responses = [c.token_ids for c in answers]
        exact = self.reference_of(responses, [prompt] * len(answers))
        told = within([c.logprobs for c in answers], exact, BAN_SHIFT, "log-probs, which leave out the ban")
        return f"none of {len(tokens)} tokens, though their probability is {wanted:.2f}; {told}"

    def scores_of_given_tokens(self) -> str:
        """vLLM's prompt_logprob_token_ids: the head on response rows alone, the prompt from the prefix cache."""
        from vllm import SamplingParams

        self._sample(5)  # fills the prefix cache
        responses = self.random_responses()
        parameters = [
            SamplingParams(
                max_tokens=1,
                detokenize=False,
                skip_reading_prefix_cache=False,
                prompt_logprob_start=len(prompt.token_ids) - 1,
                prompt_logprob_token_ids=response[:, None].tolist(),
            )
            for prompt, response in zip(self.encoded, responses, strict=True)
        ]
        inputs = [vllm_prompt(p, r) for p, r in zip(self.encoded, responses, strict=True)]
        outputs = self._engine._llm.generate(inputs, parameters, use_tqdm=False)
        found = [output.prompt_token_id_logprobs for output in outputs]
        if any(scores is None for scores in found):
            raise CheckError("vLLM left out the scores of a prompt")
        cached = min(output.num_cached_tokens for output in outputs)
        if not cached:
            raise CheckError("vLLM did not use its prefix cache")
        told = within([s[:, 0] for s in found], self.reference_of(responses), self.tolerance, "log-probs")
        return f"{told}; {cached} or more tokens of each prompt from the prefix cache"

    def reference_of(self, responses, encoded=()):
        return self.exact(self._model, responses, encoded)

    def _sample(self, seed: int) -> list:
        return [answer for (answer,) in self._engine.generate(self.encoded, [[seed]] * len(self.encoded))]

    def _gap(self, seed: int) -> float:
        answers = self._sample(seed)
        return gap([a.logprobs for a in answers], self.reference_of([a.token_ids for a in answers]))

    @torch.no_grad()
    def _round(self) -> None:
        """Gives the reference the values that a publication carries."""
        for weight in self._model.parameters():
            weight.copy_(weight.to(getattr(torch, self.bench.dtype)))

    def _publish(self, version: int) -> int:
        dtype = getattr(torch, self.bench.dtype)
        named = ((n, p.detach().to("cpu", dtype)) for n, p in self._model.named_parameters())
        buckets = list(to_buckets(named, version, self.config.learner.bucket_bytes))
        self._engine.load_weights(version, buckets)
        return sum(bucket.num_bytes for bucket in buckets)
