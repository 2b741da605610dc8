"""cpu_torch: transformers' video processors import beside a CPU torch; a CUDA torch changes nothing."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.engine
def test_video_processors_import_after_video_opd():
    assert (
        run("import video_opd; from transformers import Qwen3VLProcessor; print(Qwen3VLProcessor.__name__)")
        == "Qwen3VLProcessor"
    )


PRETEND = """
import importlib.metadata as metadata, sys
versions = {versions!r}
real = metadata.version
def version(package):
    if package not in versions: return real(package)
    if versions[package] is None: raise metadata.PackageNotFoundError(package)
    return versions[package]
metadata.version = version
import video_opd
finders = [f for f in sys.meta_path if 'Torchvision' in type(f).__name__]
print(len(finders), sys.modules.get('torchaudio', 'open'), sys.modules.get('torchcodec', 'open'))
"""


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (
            {"torch": "2.13.0", "torchvision": "0.28.0", "torchaudio": "2.11.0", "torchcodec": "0.17.0"},
            "0 open open",
        ),
        (
            {"torch": "2.13.0+cu130", "torchvision": "0.28.0+cu130", "torchaudio": None, "torchcodec": None},
            "0 open open",
        ),
        (
            {
                "torch": "2.13.0+cpu",
                "torchvision": "0.28.0+cpu",
                "torchaudio": "2.11.0+cpu",
                "torchcodec": None,
            },
            "0 open open",
        ),
        (
            {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0", "torchcodec": "0.17.0"},
            "1 None None",
        ),
        ({"torch": None}, "0 open open"),
    ],
)
def test_it_acts_only_on_a_cpu_torch_with_cuda_companions(versions, expected):
    assert run(PRETEND.format(versions=versions)) == expected
