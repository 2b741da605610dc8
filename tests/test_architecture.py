"""The tree is the architecture: who may import whom, read from the source files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("actors", "learner", "teacher_service", "curriculum")
OURS = {*ROOMS, "video_opd", "driver", "evaluation", "demo", "benchmarks", "launch"}
SOURCES = [*sorted(p for name in OURS - {"launch"} for p in (ROOT / name).rglob("*.py")), ROOT / "launch.py"]


def imported_modules(source: str, package: str = "") -> set[str]:
    """Dotted names of every module that `source` imports, at any depth, by statement or by import_module('name')."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names.add(".".join([*parents, *([node.module] if node.module else [])]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def imports_of(path: Path) -> set[str]:
    return imported_modules(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))


def our_parts_imported_by(part: str) -> dict[str, set[str]]:
    """File -> the parts of this project that it imports."""
    files = [p for p in SOURCES if p.relative_to(ROOT).parts[0] == part]
    assert files, f"no source file in {part}/"
    return {str(p.relative_to(ROOT)): {m.partition(".")[0] for m in imports_of(p)} & OURS for p in files}


def importers_of(package: str) -> set[Path]:
    return {p.relative_to(ROOT) for p in SOURCES if package in {m.partition(".")[0] for m in imports_of(p)}}


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
    expected = {
        "numpy",
        "decord.bridge",
        "vllm.sampling",
        "ray",
        "deepspeed.comm",
        "av",
        "room.sub",
        "room.sub.cousin",
        "room.aunt",
    }
    assert imported_modules(source, "room.sub") - {"importlib"} == expected


def test_the_shared_package_imports_no_room():
    for file, parts in our_parts_imported_by("video_opd").items():
        assert parts <= {"video_opd"}, f"{file} imports {parts}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_shared_package_and_itself(room):
    for file, parts in our_parts_imported_by(room).items():
        assert parts <= {"video_opd", room}, f"{file} imports {parts}"


def test_evaluation_imports_only_the_shared_package_and_itself():
    for file, parts in our_parts_imported_by("evaluation").items():
        assert parts <= {"video_opd", "evaluation"}, f"{file} imports {parts}"


def test_clips_are_decoded_in_one_file():
    assert importers_of("decord") == {Path("video_opd/video/decoders.py")}


def test_vllm_is_imported_by_engines_and_the_weight_transfer_only():
    importers = importers_of("vllm")
    assert importers, "nothing imports vllm"
    assert {p.name for p in importers} <= {"engine.py", "vllm_engine.py", "transfer.py"}, importers


def test_deepspeed_is_imported_by_the_learners_engine_only():
    assert importers_of("deepspeed") == {Path("learner/engine.py")}
