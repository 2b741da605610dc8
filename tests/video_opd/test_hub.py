"""Models of the hub: from a local copy of its cache's layout, in processes, without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_opd import ROOT
from video_opd.config_file import load_demo, resolve_paths
from video_opd.content import folder_digest
from video_opd.hub import commit_of, is_hub_model, model_name

OLD, NEW = "a" * 40, "b" * 40
DEMO = ROOT / "demo" / "models"


def add_model(
    hub: Path, name: str, source: Path, commit: str, ref: str = "main", leave_out: str = ""
) -> None:
    """Writes one commit of a model as huggingface_hub does: links into blobs, and a ref."""
    repo = hub / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for file in source.iterdir():
        if not leave_out or not file.name.endswith(leave_out):
            blob = repo / "blobs" / f"{commit[:4]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture
def hub(tmp_path) -> Path:
    folder = tmp_path / "home" / "hub"
    add_model(folder, "Org/Student", DEMO / "start", OLD, "v1")
    add_model(folder, "Org/Student", DEMO / "student", NEW)
    add_model(folder, "Org/Teacher", DEMO / "teacher", NEW)
    return folder


def launched(hub: Path, *arguments: str, module: str = "launch") -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in an empty folder, with the cache alone."""
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_TOKEN")}
    env = clean | {"HF_HOME": str(hub.parent), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=hub.parent, env=env, timeout=300, capture_output=True, text=True)


def test_a_name_is_of_the_hub_by_its_form_where_there_is_no_such_path(tmp_path):
    (tmp_path / "Org" / "Here").mkdir(parents=True)
    named = ["Org/Student", f"Org/Student@{NEW}", "Org/Student@refs/pr/1", "Org/There", "Org/a.b-c_d"]
    paths = ["Org/Here", "models/Qwen3-VL-8B-Instruct", "/models/x", "./Org/x", "../x/y", "a/b/c", "name", ""]
    assert [name for name in named + paths if is_hub_model(name, tmp_path)] == named
    config = load_demo(["student=Org/Here", f"teacher=Org/Teacher@{OLD}"])
    assert config.student == "Org/Here"
    config = resolve_paths(config.model_copy(update={"student": "Org/Here"}), tmp_path)
    assert (config.student, config.teacher) == (str(tmp_path / "Org" / "Here"), f"Org/Teacher@{OLD}")
    assert [t.name for t in config.teacher_models] == ["Teacher"]


def test_a_snapshot_is_known_by_its_name_and_commit(hub):
    student = hub / "models--Org--Student" / "snapshots" / NEW
    assert (model_name(student), commit_of(student), commit_of(hub)) == ("Student", NEW, None)
    (student / "README.md").write_text("what `hf download` adds")
    assert folder_digest(student) == f"Student@{NEW}" and commit_of(student.parent / OLD) == OLD


CODE = """
import sys
from video_opd.config_file import load_demo
from video_opd.hub import on_this_node, pinned, with_models_of
config = load_demo(sys.argv[1:])
local = on_this_node(config, teachers=True)
print(local.student, local.teacher, sep="\\n")
again = on_this_node(pinned(config, local), teachers=True)
assert on_this_node(config, teachers=False).teacher == config.teacher
assert again == local and with_models_of(local, config) == config
print(pinned(config, local).student, pinned(config, local).teacher, sep="\\n")
"""


def test_a_name_becomes_the_folder_of_its_commit_which_the_configuration_keeps(hub):
    (hub.parent / "hub_check.py").write_text(CODE)
    done = launched(hub, "student=Org/Student", f"teacher={DEMO / 'teacher'}", module="hub_check")
    snapshots = hub / "models--Org--Student" / "snapshots"
    teacher = str(DEMO / "teacher")
    assert done.stdout.split() == [str(snapshots / NEW), teacher, f"Org/Student@{NEW}", teacher], done.stderr
    done = launched(hub, "student=Org/Student@v1", "teacher=Org/Teacher", module="hub_check")
    assert done.stdout.split()[::2] == [str(snapshots / OLD), f"Org/Student@{OLD}"], done.stderr
    assert done.stdout.split()[3] == f"Org/Teacher@{NEW}"


MAIN = """
import sys
import launch
for arguments in sys.argv[1:]:
    print("code", launch.main(arguments.split()), flush=True)
    print("---", file=sys.stderr, flush=True)
"""


def test_what_cannot_be_had_is_one_line_and_exit_code_2_and_a_dry_run_needs_no_weights(hub):
    """A dry run without the hub takes the committed shapes."""
    add_model(hub, "Org/Bare", DEMO / "student", NEW, leave_out=".safetensors")
    (hub.parent / "hub_main.py").write_text(MAIN)
    refused = {
        "student=Org/Missing": "Org/Missing cannot be had from the hub, and no folder has that name: HF",
        f"student=Org/Student@{'c' * 40}": "`hf download Org/Student` where there is a network",
        "student=Org/Bare": "has no safetensors weights",
        "student=Org/Student trust_remote_code=true": "no code is downloaded from the hub",
    }
    qwen = "Qwen/Qwen3-VL"
    dry = (
        "student=Org/Bare --dry-run",
        f"student={qwen}-4B-Instruct@main teacher={qwen}-8B-Instruct --dry-run",
    )
    done = launched(hub, *refused, *dry, module="hub_main")
    *errors, first, second, _ = done.stderr.split("---\n")
    for error, message in zip(errors, refused.values(), strict=True):
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    codes = [out.partition("\n") for out in done.stdout.split("code ")[1:]]
    assert [code for code, *_ in codes[:5]] == ["2"] * 4 + ["0"] and not first, second
    assert "student's weights" in codes[3][2] and "student   Org/Bare" in codes[3][2]
    assert "NOT CHECKED  Qwen/Qwen3-VL-4B-Instruct@main cannot be had from the hub" in codes[4][2]
    assert "configs/shapes/Qwen3-VL-4B-Instruct.json" in codes[4][2]


ONLINE = """
import sys
from unittest.mock import patch
import huggingface_hub
from video_opd.hub import fetch
files = sys.argv[1:]
seen = []
def download(repo_id, *, revision, allow_patterns, ignore_patterns):
    seen[:] = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
    return "/snapshot"
for weights in (True, False):
    with patch("huggingface_hub.snapshot_download", download):
        fetch("Org/Student", weights)
    print(*seen)
"""


def test_neither_pickles_nor_code_are_downloaded(hub):
    (hub.parent / "hub_files.py").write_text(ONLINE)
    wanted = [
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "video_preprocessor_config.json",
    ]
    weights = ["model-00001-of-00002.safetensors"]
    others = [
        "pytorch_model.bin",
        "modeling.py",
        "tokenizer.py",
        "x.pt",
        "sub/a.safetensors",
        "sub/config.json",
    ]
    done = launched(hub, *wanted, *weights, *others, module="hub_files")
    assert done.stdout.splitlines() == [" ".join(wanted + weights), " ".join(wanted)], done.stderr


def test_adapters_name_their_base_as_peft_looks_for_it(tmp_path):
    from peft import PeftConfig

    from video_opd.config_learner import LearnerConfig
    from video_opd.weights.adapters import PREFIX, write_adapter

    layer = {f"{PREFIX}layers.0.q_proj.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    for base in (f"Org/Student@{NEW}", "/models/Student@home"):
        write_adapter(tmp_path, layer, LearnerConfig(lora_rank=2), base)
        config = PeftConfig.from_pretrained(str(tmp_path))
        expected = ("Org/Student", NEW) if base.startswith("Org") else (base, None)
        assert (config.base_model_name_or_path, config.revision) == expected
