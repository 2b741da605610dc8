"""vLLM's second model runner, which GPUs use, on a CPU."""

import os
from types import SimpleNamespace


class NoDriver:
    """No device for Triton: kernels are interpreted."""

    @staticmethod
    def is_active() -> bool:
        return False


def use_second_runner_on_cpu() -> None:
    """For this process, before it imports vLLM: Triton's interpreter runs the runner's own kernels, in numpy.

    vLLM 0.32 asks for Triton's CPU backend, which no release has, and does not use it: kernels are decorated
    by `triton.jit`, which returns an interpreted function where TRITON_INTERPRET is set.
    """
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=NoDriver, compiler=None)  # type: ignore
