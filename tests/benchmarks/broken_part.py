"""A part of benchmarks.gpu_check of which most checks end badly."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.part import Bench, CheckError, NotHere


class Checks:
    def __init__(self, bench: Bench, name: str):
        self._child = Path(bench.folder) / "child"

    def passes(self) -> str:
        return "all is well"

    def finds(self) -> str:
        raise CheckError("0.3 from float32's")

    def raises(self) -> str:
        raise ValueError("a first line\na second line")

    def does_not_apply(self) -> str:
        raise NotHere("needs a GPU")

    def crashes(self) -> str:
        print("the last words", flush=True)
        os.abort()

    def hangs(self) -> str:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        unfinished = self._child.with_suffix(".tmp")
        unfinished.write_text(str(sleeper.pid))
        unfinished.rename(self._child)
        time.sleep(600)
        return "never"
