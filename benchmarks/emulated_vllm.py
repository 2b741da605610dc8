"""vLLM around a model that sleeps: scheduler, processing of inputs, caches and weights are vLLM's own."""

import os
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from benchmarks.events import record_calls
from video_opd.models import vllm_engine

TOKEN = 0  # every sampled token


class SleepingExecutor(UniProcExecutor):
    """A real worker whose passes sleep, `prompt_s` for each prompt that begins; tokens then cost nothing.

    All log-probs are 0.
    """

    prompt_s = 0.0

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        begun = scheduler_output.scheduled_new_reqs
        time.sleep(self.prompt_s * len(begun))
        names = list(scheduler_output.num_scheduled_tokens)
        zeros = np.zeros((len(names), 1), np.int32)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[[TOKEN] for _ in names],
            logprobs=LogprobsLists(zeros + TOKEN, zeros.astype(np.float32), zeros[:, 0]),
            prompt_token_id_logprobs_dict={r.req_id: s for r in begun if (s := _asked_scores(r)) is not None},
        )
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future


def _asked_scores(request: Any) -> torch.Tensor | None:
    """Log-probs of the tokens of its prompt that a request asks for."""
    ids = request.sampling_params.prompt_logprob_token_ids
    return None if ids is None else torch.zeros(ids.shape)


def emulate_vllm(prompt_s: str) -> None:
    """From now on, engines that this process starts sleep, and what they do to an input is recorded.

    prompt_s: the environment variable. Engines take requests as on a GPU, by vLLM's second model runner.
    """
    SleepingExecutor.prompt_s = float(os.environ[prompt_s])
    start = vllm_engine.start_vllm

    def start_sleeping(*arguments: Any, **options: Any) -> Any:
        llm = start(*arguments, distributed_executor_backend=SleepingExecutor, **options)
        config: Any = type(llm.llm_engine.vllm_config)
        config.use_v2_model_runner = True
        return llm

    vllm_engine.start_vllm = start_sleeping
    record_calls(BaseMultiModalProcessor, "apply", "vllm")
