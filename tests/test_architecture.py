"""The tree is the architecture: who may import whom, and how long files and functions may be."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from video_opd import ROOT

ROOMS = ("actors", "learner", "teacher_service", "curriculum", "evaluation")
PARTS = {*ROOMS, "video_opd", "preflight", "driver", "demo", "benchmarks", "launch"}
# What each part of video_opd may import beside the modules at its top level, which may import none of these.
LAYERS = ("files", "cluster", "video", "models", "weights", "datasets")
FOR_USERS = Path("video_opd/clips.py")  # imports from a layer; nothing here imports it
BELOW = {
    "": set(),
    "files": set(),
    "cluster": set(),
    "video": {"files", "cluster"},
    "models": {"files", "cluster", "video"},
    "weights": {"files", "cluster", "video", "models"},
    "datasets": {"files", "cluster", "video"},
}


def imported_modules(source: str, package: str = "") -> set[str]:
    """Dotted names of all that `source` imports, at any depth, by statement or by import_module('name')."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def python_files() -> list[Path]:
    """Those that git tracks, and those that it does not know yet, relative to the checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        listed = [str(p.relative_to(ROOT)) for part in PARTS for p in (ROOT / part).rglob("*.py")]
        listed += [*map(str, ROOT.glob("*.py"))]
    return [Path(name) for name in sorted(set(listed)) if (ROOT / name).is_file()]


FILES = python_files()
SOURCES = [path for path in FILES if path.parts[0] != "tests"]


@cache
def imports_of(path: Path) -> set[str]:
    return imported_modules((ROOT / path).read_text(), ".".join(path.parent.parts))


def parts_of(path: Path) -> set[str]:
    """The parts of this project that a file imports."""
    return {name.partition(".")[0] for name in imports_of(path)} & PARTS


def importers_of(package: str) -> set[str]:
    return {str(p) for p in SOURCES if package in {name.partition(".")[0] for name in imports_of(p)}}


def test_imports_are_found_at_any_depth_and_in_any_form():
    source = """
import numpy, decord.bridge
from vllm.sampling import SamplingParams
def f():
    import ray
    importlib.import_module("deepspeed.comm")
    __import__("av")
from . import sibling
from .cousin import x
from ..aunt import y
"""
    expected = {"numpy", "decord.bridge", "vllm.sampling", "ray", "deepspeed.comm", "av"}
    expected |= {"room.sub", "room.sub.sibling", "room.sub.cousin", "room.aunt"}
    assert expected <= imported_modules(source, "room.sub")


@pytest.mark.parametrize("part", ["video_opd", "preflight", *ROOMS])
def test_the_shared_package_preflight_and_the_rooms_import_the_shared_package_and_themselves_alone(part):
    files = [path for path in SOURCES if path.parts[0] == part]
    assert files
    for path in files:
        assert parts_of(path) <= {"video_opd", part}, f"{path} imports {parts_of(path)}"


def test_only_launch_and_benchmarks_import_the_driver():
    importers = {path.parts[0] for path in SOURCES if "driver" in parts_of(path)}
    assert importers == {"driver", "launch.py", "benchmarks"}


@pytest.mark.parametrize("layer", BELOW)
def test_inside_the_shared_package_imports_go_down(layer):
    files = [p for p in SOURCES if p.parts[0] == "video_opd" and p != FOR_USERS and p.name != "__init__.py"]
    files = [p for p in files if (p.parts[1] if len(p.parts) > 2 else "") == layer]
    assert files
    for path in files:
        names = {name.split(".")[1] for name in imports_of(path) if name.startswith("video_opd.")}
        assert names & set(LAYERS) <= BELOW[layer] | {layer}, f"{path} imports {names & set(LAYERS)}"


def test_the_module_for_users_has_no_users_here():
    assert not [path for path in SOURCES if "video_opd.clips" in imports_of(path)]


def test_clips_are_decoded_in_one_file_and_in_the_loop_that_does_without_this_system():
    assert importers_of("decord") == {"video_opd/video/decoders.py", "benchmarks/plain_loop.py"}


def test_deepspeed_is_imported_by_the_learner_only():
    assert importers_of("deepspeed") == {
        f"learner/{name}.py" for name in ("engine", "deepspeed_config", "loading")
    }


def test_the_driver_starts_without_the_libraries_of_the_engines():
    code = "import sys, launch; print(*({'torch', 'transformers', 'vllm', 'deepspeed'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]


def test_vllm_is_imported_by_engines_and_the_transfer_of_weights_only():
    engines = {"teacher_service/engine.py", "video_opd/models/vllm_engine.py"}
    others = importers_of("vllm") - engines
    allowed = (
        "video_opd/weights/",
        "actors/engine.py",
        "benchmarks/gpu_check/",
        "benchmarks/emulated_vllm.py",
    )
    assert all(name.startswith(allowed) for name in others), others


def test_every_package_is_installed():
    packages = {str(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == packages


# Limits that ruff has no rule for; those of line length and of statements are in pyproject.toml.
FILE_LINES, FUNCTION_LINES, LAUNCH_LINES, SOURCE_LINES = 400, 60, 300, 31_000


def test_files_and_functions_are_short():
    long = []
    for path in SOURCES:
        text = (ROOT / path).read_text()
        if text.count("\n") > FILE_LINES:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)
    assert (ROOT / "launch.py").read_text().count("\n") <= LAUNCH_LINES


def test_the_source_is_no_longer_than_it_was_agreed():
    assert sum((ROOT / path).read_text().count("\n") for path in SOURCES) <= SOURCE_LINES


FOREIGN = {"evaluation/eval_dataloader.py", "evaluation/compute_metrics.py"}  # of TimeLens' own code
FOREIGN |= {"evaluation/vlmeval/dataset/vidi_vue_tr.py"}  # of TimeLens2's


def test_files_named_in_docstrings_and_docs_exist():
    """A word such as driver/run.py or docs/data.md, in a source or document, names a file of the project."""
    folders = "|".join(sorted(PARTS - {"launch"} | {"docs", "configs", "tests", "deploy"}))
    named = re.compile(rf"(?<![\w/.-])((?:{folders})/[\w/.-]+\.(?:py|md|yaml))\b")
    texts = [*FILES, *(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])]
    missing = {
        f"{path}: {name}"
        for path in texts
        for name in named.findall((ROOT / path).read_text())
        if name not in FOREIGN and not (ROOT / name).exists()
    }
    assert not missing, "\n".join(sorted(missing))
