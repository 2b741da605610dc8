"""vLLM around a model that sleeps: scheduler, processing of inputs, caches and weights are vLLM's own."""

import os
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from benchmarks.emulated_engines import ROLLOUT
from benchmarks.events import record_calls
from video_opd.models import vllm_engine

TOKEN = 0  # every sampled token


class SleepingExecutor(UniProcExecutor):
    """A real worker whose passes sleep, ROLLOUT for each prompt that begins; tokens then cost nothing."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        time.sleep(float(os.environ[ROLLOUT]) * len(scheduler_output.scheduled_new_reqs))
        names = list(scheduler_output.num_scheduled_tokens)
        column = np.zeros((len(names), 1))
        logprobs = LogprobsLists(
            column.astype(np.int32) + TOKEN, column.astype(np.float32), column[:, 0].astype(int)
        )
        places = {name: place for place, name in enumerate(names)}
        output = ModelRunnerOutput(names, places, [[TOKEN] for _ in names], logprobs)
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future


def emulate_vllm() -> None:
    """From now on, engines that this process starts sleep, and what they do to an input is recorded."""
    start = vllm_engine.start_vllm

    def start_sleeping(*arguments: Any, **options: Any) -> Any:
        return start(*arguments, distributed_executor_backend=SleepingExecutor, **options)

    vllm_engine.start_vllm = start_sleeping
    record_calls(BaseMultiModalProcessor, "apply", "vllm")
