"""Untrusted data, checkpoints and models run no code and name no files elsewhere. See docs/security.md."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray._common.usage import usage_lib as ray_usage

from driver.upload import fetch_run
from learner import safe_load
from tests.driver.test_checkpoint import read, write_checkpoint
from tests.test_architecture import SOURCES
from tests.video_opd.datasets.test_formats import DATA, GOLDEN, MANIFEST_ROW, VIDEO, golden_file
from tests.video_opd.datasets.test_formats import config as dataset_config
from tests.video_opd.test_files import CONFIG, write_model
from video_opd.config import Config
from video_opd.config_file import load_config, parse_section
from video_opd.config_teachers import TeacherModel
from video_opd.content import is_inside
from video_opd.datasets import read_prompts
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.manifest import write_manifest as write_rows
from video_opd.errors import CheckpointError, ClipError, ConfigError, DataError, ModelError
from video_opd.files.checkpoint import MANIFEST, write_manifest
from video_opd.models.forward import load_model
from video_opd.models.model_files import read_model_info
from video_opd.models.prompting import PromptEncoder
from video_opd.video.clips import plan_clip

ROOT = Path(__file__).resolve().parents[1]
PICKLES = [
    f"{module}.{name}"
    for module in ("pickle", "dill", "cloudpickle", "joblib", "marshal")
    for name in ("load", "loads")
]
NEVER = {
    *PICKLES,
    "pickle.Unpickler",
    "shelve.open",
    "eval",
    "exec",
    "os.system",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
SAID_OTHERWISE = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}


def unsafe_calls(source: str) -> list[str]:
    """Calls that run what a file says, by the names they are written with."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        said = {
            key: value.value for key, value in keywords.items() if key and isinstance(value, ast.Constant)
        }
        if name in NEVER or any(said.get(key) is value for key, value in SAID_OTHERWISE.items()):
            found.append(f"{name}:{node.lineno}")
        if name == "torch.load" and said.get("weights_only") is not True:
            found.append(f"{name}:{node.lineno}")
    return found


@pytest.mark.parametrize(
    "call",
    [
        "eval(x)",
        "exec(x)",
        "pickle.loads(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "A.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_a_call_that_runs_what_a_file_says_is_found(call):
    assert len(unsafe_calls(f"def f():\n    return {call}")) >= 1
    assert not unsafe_calls("model.eval(); torch.load(x, weights_only=True); np.load(x); yaml.safe_load(x)")


def test_no_module_runs_what_a_file_says():
    found = {str(path): unsafe_calls((ROOT / path).read_text()) for path in SOURCES}
    assert len(found) > 80 and not {path: calls for path, calls in found.items() if calls}


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def torch_file(value: Any, path: Path, protocol: int = 2) -> None:
    torch.save(value, path, pickle_protocol=protocol)


def bare_pickle(value: Any, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


def legacy_file(value: Any, path: Path, protocol: int = 2) -> None:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def sign(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, 3)


@pytest.mark.parametrize("write", [torch_file, bare_pickle, legacy_file])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_checkpoint_with_code_in_it_is_refused_before_any_of_it_runs(write, protocol, tmp_path):
    """Its manifest is right: whoever made the file made that too."""
    folder, marker = write_checkpoint(tmp_path, 3), tmp_path / "marker"
    assert read(folder).step == 3
    path = folder / "deepspeed" / "state" / "mp_rank_00_model_states.pt"
    path.parent.mkdir(parents=True)
    torch.save({"module": {"w": torch.ones(2)}}, path)
    sign(folder)
    assert read(folder).step == 3, "plain tensors are accepted"
    write({"module": Marks(marker)}, path, protocol)
    sign(folder)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    one_line(caught.value, str(folder), path.name)
    assert not marker.exists()
    if write is bare_pickle:
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the pickle does run code"


@pytest.mark.engine
def test_deepspeed_and_all_else_in_a_learners_process_read_tensors_alone(tmp_path):
    """Second line of defence: torch.load(weights_only=False), as DeepSpeed calls it, does not run code."""
    marker = tmp_path / "marker"
    torch_file({"module": Marks(marker)}, tmp_path / "bad.pt")
    torch_file({"module": {"w": torch.ones(2)}}, tmp_path / "good.pt")
    (tmp_path / "reads.py").write_text(
        "import sys, torch\n"
        "from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine\n"
        "from deepspeed.runtime.zero.config import ZeroStageEnum\n"
        "engine = TorchCheckpointEngine()\n"
        "print(engine.load('good.pt', map_location='cpu')['module']['w'].sum())\n"
        "torch.save({'stage': ZeroStageEnum.weights}, 'stage.pt')\n"
        "assert engine.load('stage.pt')['stage'] == 3\n"
        "engine.load('bad.pt', map_location='cpu')\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-P", safe_load.__file__, "reads"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert "tensor(2.)" in done.stdout and done.returncode == 1, done.stderr[-2000:]
    assert "UnpicklingError" in done.stderr and not marker.exists()


@pytest.mark.parametrize(
    "name", ["../../state.json", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "a//b", ""]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(name, tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "digest": "x"}
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n")
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    one_line(caught.value, str(folder), MANIFEST, "not inside it")


def test_a_run_at_a_url_is_written_below_the_run_folder_alone(tmp_path):
    """A store that lists whatever it likes."""
    checkpoint = write_checkpoint(tmp_path / "run", 3)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["../../../../outside"] = {"bytes": 1, "digest": "x"}
    store = fsspec.filesystem("memory")
    for file in (p for p in checkpoint.rglob("*") if p.is_file()):
        store.pipe_file(f"/evil/run/checkpoints/step-3/{file.relative_to(checkpoint)}", file.read_bytes())
    store.pipe_file("/evil/run/config.yaml", b"")
    store.pipe_file(f"/evil/run/checkpoints/step-3/{MANIFEST}", json.dumps(manifest).encode() + b"\n")
    store.pipe_file("/evil/outside", b"x")
    with pytest.raises(CheckpointError) as caught:
        fetch_run("memory://evil/run", tmp_path / "runs")
    one_line(caught.value, "memory://evil/run", "not inside it")
    for url in ("memory://evil/..", "memory://evil/run/.."):
        with pytest.raises(ConfigError) as bad:
            fetch_run(url, tmp_path / "runs")
        one_line(bad.value, url)
    assert not (tmp_path / "outside").exists() and not list((tmp_path / "runs").glob("*"))


def one_line(error: BaseException, *named: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in named:
        assert part in message, message


def config_with(**changes: Any) -> Config:
    demo = load_config(ROOT / "configs" / "demo.yaml").model_dump()
    return parse_section(Config, demo | changes, "x")


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/b", "/a", "a\\b", "C:x", "a\nb", "", ".hidden"])
def test_names_of_runs_and_teachers_stay_in_their_folder(name):
    with pytest.raises(ConfigError, match="run_name"):
        config_with(run_name=name)
    with pytest.raises(ConfigError, match="name"):
        parse_section(TeacherModel, {"name": name, "model": "m"}, "x")
    assert config_with(run_name="2026-01-01 a=b").run_name == "2026-01-01 a=b"


@given(st.text(alphabet="ab./\\:C\0", max_size=8))
def test_a_name_that_is_inside_is_so_for_the_system_too(name):
    if is_inside(name):
        assert os.path.normpath(os.path.join("/root", name)).startswith("/root/")


ELSEWHERE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../x.mp4",
    "C:\\videos\\x.mp4",
    "C:x.mp4",
    "..\\..\\x.mp4",
    "\\\\host\\share\\x.mp4",
]


PLAIN = (".txt", ".tsv")  # backslashes are themselves there


@pytest.mark.parametrize("video", ELSEWHERE)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_an_annotation_of_a_video_elsewhere_is_refused_in_every_format(name, video, tmp_path):
    golden, videos = golden_file(name), tmp_path / "videos"
    videos.mkdir()
    first = next(read_annotations(resolve(dataset_config(golden, videos, name)))).video
    path, options = tmp_path / golden.name, {}
    text = golden.read_text()
    path.write_text(text.replace(first, video if golden.suffix in PLAIN else json.dumps(video)[1:-1]))
    assert first in text
    if name == "charades_sta":
        lengths = tmp_path / "lengths.csv"
        lengths.write_text((DATA / "charades_sta.csv").read_text() + f"\n{video},,,,,,,,,,12.0\n")
        options["lengths"] = str(lengths)
    with pytest.raises(DataError) as caught:
        read_prompts(dataset_config(path, videos, name, **options), VIDEO, 32)
    one_line(caught.value, str(path), repr(video), "is not inside")


@pytest.mark.parametrize("video", ELSEWHERE)
def test_a_manifest_row_of_a_video_elsewhere_is_refused(video, tmp_path):
    path = tmp_path / "m.parquet"
    write_rows([{**MANIFEST_ROW, "video": video}], path, {})
    with pytest.raises(DataError) as caught:
        read_prompts(dataset_config(path, tmp_path), VIDEO, 32)
    one_line(caught.value, f"{path}: row 1", repr(video), "is not inside")


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl", "a.txt"])
def test_an_annotation_file_with_a_pickle_is_refused_before_any_of_it_runs(name, tmp_path):
    marker = tmp_path / "marker"
    bare_pickle(Marks(marker), tmp_path / name)
    (tmp_path / "l.csv").write_text("id,length\n")
    with pytest.raises(DataError) as caught:
        read_prompts(
            dataset_config(tmp_path / name, tmp_path, "manifest" if name == "a.parquet" else "auto"),
            VIDEO,
            32,
        )
    one_line(caught.value, str(tmp_path / name))
    assert not marker.exists()


def test_a_manifest_with_a_pickle_in_its_metadata_is_read_without_it(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.parquet"
    write_rows([{**MANIFEST_ROW, "video": "a.mp4"}], path, {})
    table = pq.read_table(path)
    keys = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Marks(marker)),
    }
    field = table.schema.field("query").with_metadata(keys)
    schema = table.schema.set(table.column_names.index("query"), field).with_metadata(
        {b"pandas": pickle.dumps(Marks(marker))}
    )
    pq.write_table(pa.Table.from_arrays(table.columns, schema=schema), path)
    assert [a.video for a in read_annotations(resolve(dataset_config(path, tmp_path)))] == ["a.mp4"]
    assert not marker.exists()


def test_a_model_of_pickles_alone_is_refused(tmp_path):
    folder = write_model(tmp_path / "student")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        read_model_info(folder)
    one_line(caught.value, str(folder), "no safetensors weights", "pytorch_model.bin", "convert")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_a_model_that_brings_code_is_refused_unless_it_is_trusted(name, tmp_path):
    folder = write_model(tmp_path / "student")
    (folder / name).write_text(json.dumps(CONFIG | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(ModelError) as caught:
        read_model_info(folder)
    one_line(caught.value, str(folder / name), "trust_remote_code=true")
    assert read_model_info(folder, trust_remote_code=True).model_type == "qwen3_vl"
    assert not config_with().trust_remote_code


def test_a_models_code_does_not_run(tmp_path):
    """The loaders themselves, past the check: classes that only the folder has are an error, not run."""
    marker, folder = tmp_path / "marker", tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    of_classes = {"AutoConfig": "evil.C", "AutoProcessor": "evil.P", "AutoModelForImageTextToText": "evil.M"}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (folder / file).write_text(
            json.dumps({"model_type": "evil", "processor_class": "P", "auto_map": of_classes})
        )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder), "float32")
    with pytest.raises(ValueError, match="trust_remote_code"):
        PromptEncoder(folder, config_with().prompt, VIDEO)
    assert not marker.exists()


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
    ],
)
def test_a_playlist_called_a_video_does_not_open_the_files_that_it_names(
    decoder, playlist, split_folder, tmp_path
):
    video = next((split_folder / "videos").glob("*.mp4"))
    copy, path = tmp_path / "copy.mp4", tmp_path / "x.mp4"
    copy.write_bytes(video.read_bytes())
    config = VIDEO.model_copy(update={"decoder": decoder})
    assert plan_clip("x", copy, config, 32).num_video_frames
    path.write_text(playlist.format(copy if "EXT" in playlist else copy.name))
    with pytest.raises(ClipError) as caught:
        plan_clip("x", path, config, 32)
    one_line(caught.value, str(path), "does not begin as a video file does")


def test_ray_and_vllm_send_no_statistics():
    assert not ray_usage.usage_stats_enabled()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"  # vLLM's own switch
