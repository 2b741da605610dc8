"""docs/quickstart.md, typed word by word: its commands in one terminal, its outputs, its error messages."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import launch
from curriculum.scheduler import Scheduler
from demo.clips import DEFAULT_LEVELS, write_split
from driver import start_ray
from tests.fakes import make_prompt
from tests.real.runs import PATIENCE_S
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.errors import VideoOPDError
from video_opd.files.run_folder import new_run_folder, write_config

TEXT = (ROOT / "docs" / "quickstart.md").read_text()
CONFIG = "configs/qwen3vl_2b_1gpu.yaml"
DEMO_PARTS = ("video", "prompt", "rollout", "teacher_pool", "learner", "worker_env")
TYPED_INSTEAD = {  # what a CPU without a network needs
    "python3 -m venv .venv": "true",  # the tests run in an environment that is there
    ". .venv/bin/activate": "true",
    "pip install -c constraints.txt -e '.[gpu]'": "true",
    "hf download Qwen/Qwen3-VL-2B-Instruct --local-dir": f"cp -r {ROOT}/demo/models/student",
    "hf download Qwen/Qwen3-VL-4B-Instruct --local-dir": f"cp -r {ROOT}/demo/models/teacher",
    f"--config {CONFIG}": "--config cpu.yaml",  # the same with DEMO_PARTS of the demo's config
    "num_steps=100 eval_every=20 checkpoint_every=20": "num_steps=2 eval_every=1 checkpoint_every=1",
}
NUM_VIDEOS = 30  # 24 for training: a step of 32 prompts a round
BLOCKS = re.findall(r"^```(bash)?\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
MESSAGES = re.findall(r"^\| `(.+?)` \|", TEXT, re.MULTILINE)


def pattern(line: str) -> str:
    """What an output line of the document stands for: N and numbers are any numbers, ... is any text."""
    parts = re.split(r"(\.\.\.|\bN\b|\d+(?:\.\d+)?)", line)
    others = {"...": ".*"}
    number = r"[\d,.]+"
    return "".join(re.escape(p) if i % 2 == 0 else others.get(p, number) for i, p in enumerate(parts))


def settings() -> list[str]:
    """The document's arguments MY, as the shell makes them."""
    given = re.search(r"^MY=\(\n(.*?)^\)$", TEXT, re.MULTILINE | re.DOTALL)
    assert given
    _, config, *values = shlex.split(given[1], comments=True)
    return ["--config", str(ROOT / config), *values]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A user's folder: the checkout's commands, videos, and my.csv."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_split(folder / "clips", "train", NUM_VIDEOS, DEFAULT_LEVELS)
    (folder / "clips" / "videos").rename(folder / "videos")
    lines = (folder / "clips" / "annotations.txt").read_text().splitlines()
    with (folder / "my.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start", "end", "query"])
        for video, start, end, query in (re.split(r" |##", line, maxsplit=3) for line in lines):
            writer.writerow([f"{video}.mp4", start, end, query])
    config, demo = (yaml.safe_load((ROOT / p).read_text()) for p in (CONFIG, "configs/demo.yaml"))
    (folder / "cpu.yaml").write_text(yaml.safe_dump(config | {part: demo[part] for part in DEMO_PARTS}))
    for name in ("launch.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    return folder


def test_every_command_of_the_document_works_and_prints_what_it_says(desk):
    script = "set -eu\nexec 2>&1\n"
    expected: dict[int, list[str]] = {}
    for kind, content in BLOCKS:
        if kind == "bash":
            expected[len(expected)] = []
            script += f"{content}echo '=== done'\n"
        elif expected and "learner.lora_rank" not in content and "video,start" not in content:
            expected[len(expected) - 1] += content.splitlines()
    for theirs, ours in TYPED_INSTEAD.items():
        assert script.count(theirs) == 1, f"the document no longer types {theirs}"
        script = script.replace(theirs, ours)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=desk,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    printed = done.stdout.split("=== done\n")
    assert sum(map(len, expected.values())) > 20, "the document's outputs were not found"
    for block, lines in expected.items():
        at = 0
        for line in lines:  # in this order
            found = re.compile(pattern(line)).search(printed[block], at)
            assert found, f"not printed: {line!r}, but\n{printed[block][-4000:]}"
            at = found.end()


def test_the_documents_config_runs_on_160_prompts_of_a_users_own(tmp_path, monkeypatch, capsys):
    """The GPU's own config and models' shapes: only a plan, on as many annotations as the document says."""
    clips = tmp_path / "clips"
    write_split(clips, "train", 4, DEFAULT_LEVELS)
    (clips / "videos").rename(tmp_path / "videos")
    videos = sorted(p.name for p in (tmp_path / "videos").iterdir())
    rows = [f"{videos[i % 4]},{i % 7},{i % 7 + 2},event {i}" for i in range(200)]
    for name, part in (("train", rows[:160]), ("eval", rows[160:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["video,start,end,query", *part]))
    monkeypatch.chdir(tmp_path)
    assert launch.main([*settings(), "--dry-run", "--gpu-memory-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert "160 train prompts; 40 eval prompts" in out and "run       100 steps of 32 prompts" in out
    smaller = re.search(r"^learner\.lora_rank.*?(?=^```$)", TEXT, re.MULTILINE | re.DOTALL)
    assert smaller
    for memory in ("40", "48"):
        assert launch.main([*settings(), *smaller[0].split(), "--dry-run", "--gpu-memory-gib", memory]) == 0


BAD_ROWS = [  # a header, or a row below the right one
    "file;from;to;text",
    "nowhere.mp4,1,2,x",
    "train00000.mp4,7,8,a, b",
    "train00000.mp4,7,abc,x",
    "train00000.mp4,7,3,x",
    "train00000.mp4,7,30,x",
    "train00000.mp4,7,8,x",
]
BAD_SETTINGS = [  # beside the document's
    ["data.train={annotations: train.csv, videos: videos}", "--dry-run"],
    ["curriculum.num_selected=2500", "--dry-run"],
    ["--dry-run", "--gpu-memory-gib", "24"],
    [],  # there are no models
]


def test_each_error_of_the_document_is_what_is_said(desk, tmp_path, monkeypatch, capsys):
    """Each message comes from what the document says, and each of these mistakes is in the document."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").symlink_to(desk / "videos")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.csv").write_text((desk / "my.csv").read_text())
    said = []
    for row in BAD_ROWS:
        (tmp_path / "bad.csv").write_text(f"video,start,end,query\n{row}\n" if "," in row else row)
        assert launch.main([*settings(), "data.train.annotations=bad.csv", "--dry-run"]) == 2, row
        said.append(capsys.readouterr().err)
    for changes in BAD_SETTINGS:
        assert launch.main([*settings(), *changes]) == 2, changes
        said.append(capsys.readouterr().err)
    said += [message_of(run_twice), message_of(select_too_few), message_of(start_without_a_gpu, monkeypatch)]
    for message in MESSAGES:
        assert [line for line in said if re.search(pattern(message), line)], f"nothing says: {message}"
    for line in said:
        assert [message for message in MESSAGES if re.search(pattern(message), line)], f"not told: {line}"
    assert all(line.count("\n") <= 1 for line in said)


def message_of(function, *arguments) -> str:
    with pytest.raises(VideoOPDError) as caught:
        function(*arguments)
    return str(caught.value)


def run_twice() -> None:
    config = load_config(ROOT / CONFIG, ["run_name=first"])
    for _ in range(2):
        with new_run_folder(config) as folder:
            write_config(folder, config)


def select_too_few() -> None:
    """The teacher answers 31 of 160 prompts well enough, and a step has 32."""
    config = load_config(ROOT / CONFIG, ["curriculum.num_selected=null"])
    scheduler = Scheduler([make_prompt(f"p{i}") for i in range(160)], config)
    scheduler.validate(np.array([0.9] * 31 + [0.6] * 129))
    scheduler.start_round(np.full(160, 0.5), step=0)


def start_without_a_gpu(monkeypatch) -> None:
    """On a machine of eight CPUs. Ray is not started."""
    node = {"Alive": True, "Resources": {"CPU": 8.0, "rollout": 64.0, "teacher": 64.0, "learner": 1.0}}
    stand_ins = {"nodes": lambda: [node], "get_runtime_context": lambda: SimpleNamespace(gcs_address="")}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(start_ray.ray, name, stand_in)
    monkeypatch.setattr(start_ray, "start_local", lambda **_: SimpleNamespace(dashboard_url=""))
    start_ray.start_ray(load_config(ROOT / CONFIG), "local")
