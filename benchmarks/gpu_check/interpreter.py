"""vLLM's second model runner, which is what GPUs use, on a CPU: Triton's interpreter runs its kernels."""

import os
from types import SimpleNamespace


class NoDriver:
    """There is no device."""

    @staticmethod
    def is_active() -> bool:
        return False


def interpret_kernels() -> None:
    """For processes that start from now on: `triton.jit` returns functions that compute in numpy."""
    os.environ["TRITON_INTERPRET"] = "1"


def use_second_runner() -> None:
    """For this process, before it imports vLLM, with interpreted kernels.

    vLLM 0.32 refuses unless Triton has a CPU backend, which no release of Triton has. The runner itself calls
    no more of Triton than its kernels.
    """
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=NoDriver, compiler=None)  # type: ignore
