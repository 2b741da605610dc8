"""The vLLM teacher around a stand-in for vLLM's second model runner, with its prefix cache of whole blocks.

As in vllm/v1/worker/gpu/sample/prompt_logprob.py, rows that the cache holds are not computed: a prompt with
such a row among the given tokens has no scores at all, and prompt_logprobs has the other rows alone.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import teacher_service.engine
from benchmarks.emulated_teacher import EmulatedTeacher
from teacher_service.engine import VllmEngine, Wanted
from tests.fakes import make_prompt
from video_opd.config_teachers import TeacherConfig
from video_opd.errors import ConfigError, ParityError, RunError
from video_opd.types import EncodedPrompt

BLOCK, VOCABULARY, K, EXPANDED = 4, 20, 3, 19
BANNED, T = (0, 1), 0.7


def logits_after(prefix: list[int]) -> np.ndarray:
    """float32[V]: any that depend on the whole prefix. Banned ids are the likeliest."""
    logits = np.random.default_rng(prefix).normal(size=VOCABULARY)
    logits[[*BANNED]] += 5.0
    return logits.astype(np.float32)


def policy_after(prefix: list[int]) -> np.ndarray:
    """float64[V]: log-probs of softmax(logits / T) over all ids but the banned ones."""
    allowed = np.setdiff1d(np.arange(VOCABULARY), BANNED)
    scaled, found = logits_after(prefix)[allowed].astype(float) / T, np.full(VOCABULARY, -np.inf)
    found[allowed] = scaled - np.log(np.exp(scaled).sum())
    return found


class Runner:
    """What vLLM's model runners compute log-probs of prompts with; rows[R, V] stand for hidden states."""

    device = "cpu"

    def __init__(self, second: bool):
        self.sampler = SimpleNamespace(compute_logprobs=lambda logits: logits.log_softmax(-1))
        self._head = torch.clone
        if second:
            self.prompt_logprobs_worker = SimpleNamespace(
                compute_prompt_logprobs=lambda logits_of, rows: logits_of(rows).log_softmax(-1),
                compute_prompt_token_id_logprobs=lambda logits_of, rows: logits_of(rows).log_softmax(-1),
            )

    def logprobs_after(self, prefix: list[int], kind: str) -> np.ndarray:
        rows = torch.from_numpy(logits_after(prefix))[None]
        if second := getattr(self, "prompt_logprobs_worker", None):
            return getattr(second, f"compute_{kind}")(self._head, rows)[0].numpy()
        return self.sampler.compute_logprobs(self._head(rows))[0].numpy()


class Vllm:
    """vLLM's engine and renderer. Its last request comes out first."""

    def __init__(self, second_runner: bool = True):
        self.vllm_config, self.renderer = SimpleNamespace(use_v2_model_runner=second_runner), self
        self.llm_engine = self
        self.blocks: set[tuple[int, ...]] = set()
        self.num_rows: list[int] = []  # with logits, of each request
        self.num_rendered = self.num_computed = 0
        self._requests: list[Any] = []
        self.silent = False
        self._runner = Runner(second_runner)

    def collective_rpc(self, method: Callable[..., None], args: tuple) -> None:
        method(SimpleNamespace(model_runner=self._runner), *args)

    def render_cmpl(self, prompts: list[dict[str, Any]], skip_mm_cache: bool) -> list[dict[str, Any]]:
        self.num_rendered += len(prompts)
        return [p | {"prompt_token_ids": expanded(p["prompt_token_ids"])} for p in prompts]

    def add_request(self, name: str, prompt: dict[str, Any], how: SimpleNamespace) -> None:
        self._requests.append((name, prompt["prompt_token_ids"], how))

    def step(self) -> list[Any]:
        outputs = [self._answer(*request) for request in self._requests]
        self._requests = []
        return outputs[::-1]

    def _answer(self, name: str, ids: list[int], how: SimpleNamespace) -> Any:
        first, whole = 0, range(BLOCK, len(ids) + 1, BLOCK)
        if not getattr(how, "skip_reading_prefix_cache", False):
            first = max((n for n in whole if n < len(ids) and tuple(ids[:n]) in self.blocks), default=0)
        self.blocks |= {tuple(ids[:n]) for n in whole}
        rows = range(first, len(ids) - 1)
        given, positions = None, [None]
        if hasattr(how, "prompt_logprob_token_ids"):
            rows = range(start := how.prompt_logprob_start, len(ids) - 1)
            asked = how.prompt_logprob_token_ids.tolist()
            assert [row[0] for row in asked] == ids[start + 1 :]
            if first <= start and not self.silent:
                kind = "prompt_token_id_logprobs"
                known = [self._runner.logprobs_after(ids[: r + 1], kind) for r in rows]
                given = np.asarray([of[row] for of, row in zip(known, asked, strict=True)])
        elif hasattr(how, "prompt_logprobs"):
            positions += [self._position(ids, r, how.prompt_logprobs) for r in rows]
        self.num_rows.append(
            len(rows) if vars(how).keys() & {"prompt_logprobs", "prompt_logprob_start"} else 0
        )
        self.num_computed += len(ids) - first
        found = {"prompt_logprobs": positions, "prompt_token_id_logprobs": given, "num_cached_tokens": first}
        return SimpleNamespace(request_id=name, **found)

    def _position(self, ids: list[int], row: int, k: int) -> dict[int, Any]:
        known = self._runner.logprobs_after(ids[: row + 1], "prompt_logprobs")
        ranks = (-known).argsort().argsort() + 1
        asked = {*np.flatnonzero(ranks <= k).tolist(), ids[row + 1]}
        return {i: SimpleNamespace(logprob=float(known[i]), rank=int(ranks[i])) for i in asked}


def expanded(ids: list[int]) -> list[int]:
    return [EXPANDED, EXPANDED, *ids[1:]]


def encoded(ids: list[int]) -> EncodedPrompt:
    """A prompt of one video pad and `ids`."""

    def prepare(prompt: EncodedPrompt) -> EncodedPrompt:
        return prompt

    (prompt,) = EmulatedTeacher().prepare_ahead([make_prompt("p")], prepare)
    fields = {name: getattr(prompt, name) for name in EncodedPrompt.__slots__}
    whole = np.asarray(expanded([0, *ids]), np.int32)
    return EncodedPrompt(**fields | {"unexpanded_token_ids": [0, *ids], "token_ids": whole})


@pytest.fixture(scope="module", autouse=True)
def vllm():
    """Importing vLLM itself takes seconds."""
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.SamplingParams = SimpleNamespace  # pyright: ignore[reportAttributeAccessIssue]
    kinds = SimpleNamespace(FINAL_ONLY="final")
    parameters.RequestOutputKind = kinds  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", module)
        patch.setitem(sys.modules, "vllm.sampling_params", parameters)
        patch.setattr(
            teacher_service.engine, "vllm_prompt", lambda p: {"prompt_token_ids": p.unexpanded_token_ids}
        )
        yield


def engine_of(llm: Vllm, top_k: int = 0, is_given: bool = False) -> VllmEngine:
    config, encoder = TeacherConfig(), SimpleNamespace(pad_ids=BANNED)

    def start(*_: Any, max_logprobs: int, **options: Any) -> Vllm:
        assert max_logprobs >= top_k + is_given, "vLLM refuses to tell more"
        return llm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_service.engine, "start_vllm", start)
        how: Any = Wanted(top_k, is_given), 0, encoder, False, T
        return VllmEngine("m", config, *how)


def check(
    engine: VllmEngine, prompts: list[EncodedPrompt], responses: list[np.ndarray], prepared: Any
) -> None:
    rng, is_given = np.random.default_rng(0), engine.wanted.is_given
    # the response's own token need not be among them
    ids = [np.stack([rng.permutation(np.arange(2, VOCABULARY))[:K] for _ in r]) for r in responses]
    found = engine.score(prompts, responses, prepared, ids if is_given else None)
    for prompt, response, of_student, scores in zip(prompts, responses, ids, found, strict=True):
        ids, start = [*prompt.token_ids.tolist(), *response.tolist()], len(prompt.token_ids) - 1
        rows = np.stack([policy_after(ids[: start + i + 1]) for i in range(len(response))])
        assert scores.logprobs.dtype == np.float32
        np.testing.assert_allclose(scores.logprobs, rows[np.arange(len(response)), response], atol=1e-5)
        if engine.wanted.top_k:
            assert scores.top_k is not None
            if is_given:
                assert scores.top_k.ids.tolist() == of_student.tolist()
            else:
                np.testing.assert_allclose(scores.top_k.logprobs, -np.sort(-rows)[:, :K], atol=1e-5)
            of_ids = np.take_along_axis(rows, scores.top_k.ids.astype(int), 1)
            np.testing.assert_allclose(scores.top_k.logprobs, of_ids, atol=1e-5)


tokens = st.integers(2, 4)  # so few that sequences often begin alike
texts = st.lists(tokens, min_size=1, max_size=2 * BLOCK)


@given(
    st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=3),
    st.sampled_from([(0, False), (K, False), (K, True)]),
    st.booleans(),
    st.booleans(),
)
def test_scores_are_those_of_the_whole_sequence_whatever_the_cache_holds(calls, top_k, second_runner, ahead):
    llm = Vllm(second_runner)
    if top_k[1] and not second_runner:
        with pytest.raises(ConfigError, match=r"cannot score tokens that it is given.*engine=transformers"):
            engine_of(llm, *top_k)
        return
    engine = engine_of(llm, *top_k)
    for text, answers in calls:  # each call finds what those before have left in the cache
        prompt = encoded(text)
        prompts, responses = [prompt] * len(answers), [np.asarray(a, np.int32) for a in answers]
        prepared = [engine.prepare(prompt)] * len(answers) if ahead else None
        check(engine, prompts, responses, prepared)
    assert not ahead or llm.num_rendered == len(calls), "a prompt is rendered once for all its responses"
    assert engine.num_computed_tokens == llm.num_computed


@pytest.mark.parametrize(("top_k", "is_given"), [(0, False), (K, False), (K, True)])
def test_the_head_sees_the_response_rows_and_at_most_a_block_of_a_long_prompt(top_k, is_given):
    rng, llm = np.random.default_rng(0), Vllm()
    engine = engine_of(llm, top_k, is_given)
    prompts = [encoded(rng.integers(2, 9, 50 + i).tolist()) for i in range(2 * BLOCK)]
    responses = [rng.integers(2, 9, 3).astype(np.int32) for _ in prompts]
    check(engine, prompts, responses, None)
    rows = [n for n in llm.num_rows if n]
    assert len(rows) == len(prompts) and max(rows) <= 3 + (BLOCK if top_k and not is_given else 0)


def test_scores_that_vllm_never_gives_and_other_ids_than_the_processors_end_the_run():
    llm = Vllm()
    engine, prompt = engine_of(llm), encoded([5, 6, 7])
    llm.silent = True
    with pytest.raises(RunError, match="vLLM gave no scores for prompt p"):
        engine.score([prompt], [np.asarray([3], np.int32)])
    prompt.token_ids[1] = 7
    with pytest.raises(ParityError, match="prompt p: the teacher's vLLM does not expand it"):
        engine.prepare(prompt)
