"""Copies of checkpoints at fsspec URLs: whole or not taken for whole, beside the run, and back."""

import asyncio
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import driver.copied_files
import driver.upload
from driver.upload import Uploads, check_writable, fetch_config, fetch_run, open_url, remote_steps
from tests.driver.test_checkpoint import one_line, progress_at, read, write_checkpoint
from video_opd.errors import CheckpointError, ConfigError, InputError
from video_opd.files.checkpoint import MANIFEST, checkpoint_folder, checkpoint_steps, find_checkpoint


class Flaky(LocalFileSystem):
    """A local file system whose calls that change something can be made to fail, as a connection does."""

    protocol = "flaky"
    calls: ClassVar[list[str]] = []
    fail: ClassVar[Any] = staticmethod(lambda number: False)
    gate: ClassVar[threading.Event | None] = None
    num_bytes: ClassVar[dict[str, int]] = {}  # sent to each path

    def _count(self, call: str) -> None:
        if self.gate:
            assert self.gate.wait(60)
        self.calls.append(call)
        if self.fail(len(self.calls) - 1):
            raise ConnectionResetError("connection reset")

    def put_file(self, lpath, rpath, *arguments, **options):
        self._count(f"put {Path(rpath).name}")
        self.num_bytes[str(rpath)] = self.num_bytes.get(str(rpath), 0) + Path(lpath).stat().st_size
        return super().put_file(lpath, rpath, *arguments, **options)

    def pipe_file(self, path, value, *arguments, **options):
        self._count(f"pipe {Path(path).name}")
        self.num_bytes[str(path)] = self.num_bytes.get(str(path), 0) + len(value)
        return super().pipe_file(path, value, *arguments, **options)

    def mv(self, path1, path2, *arguments, **options):
        self._count(f"mv {Path(path2).name}")
        return super().mv(path1, path2, *arguments, **options)

    def rm_file(self, path):
        self._count(f"rm {Path(path).name}")
        return super().rm_file(path)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def working(monkeypatch):
    monkeypatch.setattr(driver.upload, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(Flaky, "calls", [])
    monkeypatch.setattr(Flaky, "num_bytes", {})
    monkeypatch.setattr(Flaky, "fail", staticmethod(lambda number: False))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "name"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "trajectories/from-step-000000.arrows",
        "curriculum/round-1.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def url_of(tmp_path: Path, protocol: str = "flaky") -> str:
    return f"{protocol}://{tmp_path}/store"


def uploads_to(tmp_path: Path, run_dir: Path, max_retries: int = 0) -> Uploads:
    return Uploads(url_of(tmp_path), run_dir, max_retries, timeout_s=60)


async def upload(uploads: Uploads, *steps: int) -> None:
    for step in steps:
        uploads.start(step)
    await uploads.finish()


@pytest.mark.parametrize("protocol", ["file", "flaky"])
def test_a_run_comes_back_as_it_was(tmp_path, run_dir, protocol):
    write_checkpoint(run_dir, 2)
    url = url_of(tmp_path, protocol)
    check_writable(url)
    asyncio.run(upload(Uploads(url, run_dir, 0, 60), 2))
    copy = fetch_run(f"{url}/name", tmp_path / "elsewhere")
    assert copy == tmp_path / "elsewhere" / "name"
    names = sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()) == names
    assert all((copy / n).read_bytes() == (run_dir / n).read_bytes() for n in names)
    assert read(find_checkpoint(copy)) == progress_at(2)
    (tmp_path / "config").mkdir()
    assert fetch_config(f"{url}/name", tmp_path / "config").read_text() == "config.yaml"


def test_memory_is_a_url_too(run_dir, tmp_path):
    write_checkpoint(run_dir, 2)
    asyncio.run(upload(Uploads("memory://bucket", run_dir, 0, 60), 2))
    copy = fetch_run("memory://bucket/name", tmp_path / "elsewhere")
    assert read(find_checkpoint(copy)) == progress_at(2)


def test_the_manifest_comes_last(tmp_path, run_dir):
    write_checkpoint(run_dir, 2)
    asyncio.run(upload(uploads_to(tmp_path, run_dir), 2))
    assert Flaky.calls[-1] == f"mv {MANIFEST}" and "put model.safetensors" in Flaky.calls


def test_an_upload_that_ends_anywhere_leaves_an_earlier_checkpoint_or_its_own(tmp_path, run_dir, capsys):
    """Of step 3 beside step 2; and of step 3 once more, in place of the one that is there."""
    write_checkpoint(run_dir, 2, "old")
    uploads = uploads_to(tmp_path, run_dir)
    uploads.upload(2)
    write_checkpoint(run_dir, 3, "new")
    first = len(Flaky.calls)
    uploads.upload(3)
    uploads.upload(3)
    num_calls = len(Flaky.calls) - first
    seen = []
    for fail_at in range(num_calls):
        store = tmp_path / str(fail_at)
        store.mkdir()
        uploads = uploads_to(store, run_dir)
        uploads.upload(2)
        first = len(Flaky.calls)
        Flaky.fail = staticmethod(lambda number, at=first + fail_at: number == at)

        def twice(uploads=uploads):
            uploads.upload(3)
            uploads.upload(3)

        with pytest.raises(ConnectionResetError):
            twice()
        copy = fetch_run(f"{url_of(store)}/name", store / "elsewhere")
        assert files_beside(copy) == files_beside(run_dir)
        (step,) = checkpoint_steps(copy)
        assert read(find_checkpoint(copy)).step == step
        seen.append(step)
    capsys.readouterr()
    assert set(seen) == {2, 3} and seen[0] == 2


def test_a_failure_is_tried_again_and_in_the_end_is_a_warning(tmp_path, run_dir, caplog):
    for step in (2, 3):
        write_checkpoint(run_dir, step)
    Flaky.fail = staticmethod(lambda number: number in (0, 9))
    asyncio.run(upload(uploads_to(tmp_path, run_dir, max_retries=2), 2))
    assert not caplog.messages
    Flaky.fail = staticmethod(lambda number: True)
    asyncio.run(upload(uploads_to(tmp_path, run_dir, max_retries=2), 3))
    (line,) = caplog.messages
    assert (
        line.startswith("warning: the checkpoint of step 3")
        and "connection reset" in line
        and str(run_dir) in line
    )
    assert checkpoint_steps(run_dir) == [2, 3]
    Flaky.fail = staticmethod(lambda number: False)
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "elsewhere")
    assert checkpoint_steps(copy) == [2]


def test_uploads_do_not_hold_up_the_loop_and_skip_what_a_newer_one_replaces(tmp_path, run_dir, monkeypatch):
    for step in (2, 3, 4):
        write_checkpoint(run_dir, step)
    gate = threading.Event()
    monkeypatch.setattr(Flaky, "gate", gate)

    async def run():
        uploads = uploads_to(tmp_path, run_dir)
        uploads.start(2)
        await asyncio.sleep(0)
        uploads.start(3)
        uploads.start(4)
        await asyncio.sleep(0)
        assert uploads.needed == [2, 4] and not list(tmp_path.glob("store/name/checkpoints/*"))
        gate.set()
        await uploads.finish()
        assert uploads.needed == []

    asyncio.run(run())
    assert remote_steps(open_url(f"{url_of(tmp_path)}/name")) == [2, 4]


def test_a_checkpoint_that_is_replaced_while_it_is_copied_is_not_taken_for_whole(
    tmp_path, run_dir, monkeypatch
):
    write_checkpoint(run_dir, 2, "old")
    uploads, put = uploads_to(tmp_path, run_dir), Flaky.put_file

    def replaced(self, lpath, rpath, *arguments, **options):
        put(self, lpath, rpath, *arguments, **options)
        if rpath.endswith("state.json"):
            write_checkpoint(run_dir, 2, "another")

    monkeypatch.setattr(Flaky, "put_file", replaced)
    uploads.upload(2)
    with pytest.raises(CheckpointError):
        fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "a")
    monkeypatch.setattr(Flaky, "put_file", put)
    uploads.upload(2)
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "a")
    assert (checkpoint_folder(copy, 2) / "student" / "model.safetensors").read_text() == "another"


def test_what_the_run_no_longer_keeps_goes_there_too(tmp_path, run_dir):
    uploads = uploads_to(tmp_path, run_dir)
    for step in (1, 2):
        write_checkpoint(run_dir, step)
        uploads.upload(step)
    checkpoint_folder(run_dir, 1).rename(tmp_path / "gone")
    write_checkpoint(run_dir, 3)
    uploads.upload(3)
    assert remote_steps(open_url(f"{url_of(tmp_path)}/name")) == [2, 3]


def test_a_partial_newest_copy_gives_way_and_it_is_said_unless_a_step_is_asked_for(tmp_path, run_dir, capsys):
    uploads = uploads_to(tmp_path, run_dir)
    for step in (2, 3):
        write_checkpoint(run_dir, step)
        uploads.upload(step)
    (tmp_path / "store" / "name" / "checkpoints" / "step-3" / MANIFEST).unlink()
    url = f"{url_of(tmp_path)}/name"
    with pytest.raises(CheckpointError) as caught:
        fetch_run(url, tmp_path / "a", step=3)
    one_line(caught.value, "partial", MANIFEST)
    with pytest.raises(CheckpointError) as caught:
        fetch_run(url, tmp_path / "a", step=5)
    one_line(caught.value, "no checkpoint of step 5", "2, 3")
    assert not (tmp_path / "a" / "name").exists()
    assert checkpoint_steps(fetch_run(url, tmp_path / "a")) == [2]
    (line,) = capsys.readouterr().out.splitlines()
    assert "step-3 is partial" in line and line.endswith("of step 2")


def test_a_damaged_copy_is_not_taken(tmp_path, run_dir):
    write_checkpoint(run_dir, 2)
    uploads_to(tmp_path, run_dir).upload(2)
    (tmp_path / "store" / "name" / "checkpoints" / "step-2" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError):
        fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "a")
    assert not list((tmp_path / "a").glob("*"))


# --- what is beside checkpoints ---


def files_beside(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    names = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    return {name: content for name, content in names.items() if not name.startswith("checkpoints/")}


def bytes_beside() -> int:
    """Sent since the last time, without checkpoints and without the list itself."""
    sent = sum(n for path, n in Flaky.num_bytes.items() if "/parts/" in path)
    Flaky.num_bytes.clear()
    return sent


def append(path: Path, content: bytes) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        return file.write(content)


def test_only_new_bytes_are_sent_and_the_same_bytes_come_back(tmp_path, run_dir, monkeypatch):
    monkeypatch.setattr(driver.copied_files, "PART_BYTES", 1 << 20)
    rows, board = run_dir / "trajectories" / "from-step-000000.arrows", run_dir / "tensorboard" / "events.1"
    append(rows, os.urandom(5 << 20))  # more than a digest reads whole
    append(board, b"events" * 1000)
    write_checkpoint(run_dir, 1)
    uploads_to(tmp_path, run_dir).upload(1)
    assert bytes_beside() == sum(map(len, files_beside(run_dir).values()))
    expected = []
    for step in (2, 3, 4):
        new = append(rows, os.urandom(10_000)) + append(board, os.urandom(1000))
        new += append(run_dir / "metrics.jsonl", b'{"step": 1}\n')
        new += append(run_dir / "curriculum" / f"round-{step}.parquet", os.urandom(100))
        write_checkpoint(run_dir, step)
        uploads_to(tmp_path, run_dir).upload(step)  # as a resumed run: nothing is remembered here
        expected.append((bytes_beside(), new))
    assert all(sent == new for sent, new in expected), expected
    write_checkpoint(run_dir, 5)
    uploads_to(tmp_path, run_dir).upload(5)
    assert bytes_beside() == 0
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "elsewhere")
    assert files_beside(copy) == files_beside(run_dir)


def test_a_file_that_was_cut_back_written_anew_or_removed_is_so_in_the_copy(tmp_path, run_dir):
    rows, metrics = run_dir / "trajectories" / "from-step-000000.arrows", run_dir / "metrics.jsonl"
    append(rows, os.urandom(6 << 20))
    append(metrics, b"a line\n" * 9)
    write_checkpoint(run_dir, 2)
    uploads = uploads_to(tmp_path, run_dir)
    uploads.upload(2)
    old = {p.name for p in (tmp_path / "store" / "name" / "parts").iterdir()}
    rows.write_bytes(rows.read_bytes()[:1000])  # as a run does that goes back to an earlier step
    append(run_dir / "trajectories" / "from-step-000002.arrows", b"x" * 7)
    metrics.write_bytes(b"another\n" * 20)
    (run_dir / "curriculum" / "round-1.parquet").unlink()
    (run_dir / "metrics.jsonl.tmp").write_bytes(b"unfinished")
    (run_dir / "curriculum" / "round-2.parquet.tmp").write_bytes(b"unfinished")
    bytes_beside()
    uploads.upload(2)
    assert bytes_beside() == 1000 + 7 + 160
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "elsewhere")
    mine = {n: c for n, c in files_beside(run_dir).items() if not n.endswith(".tmp")}
    assert files_beside(copy) == mine
    now = {p.name for p in (tmp_path / "store" / "name" / "parts").iterdir()}
    listed = json.loads((tmp_path / "store" / "name" / "files.json").read_text())
    assert old - now and now == {part for entry in listed.values() for part in entry["parts"]}


def test_a_file_that_grows_or_goes_while_it_is_sent_is_a_whole_prefix_of_itself_or_absent(
    tmp_path, run_dir, monkeypatch
):
    write_checkpoint(run_dir, 2)
    pipe, metrics = Flaky.pipe_file, run_dir / "metrics.jsonl"

    def grows(self, path, value, *arguments, **options):
        append(metrics, b"one more line\n")
        (run_dir / "curriculum" / "round-1.parquet").unlink(missing_ok=True)
        return pipe(self, path, value, *arguments, **options)

    monkeypatch.setattr(Flaky, "pipe_file", grows)
    uploads = uploads_to(tmp_path, run_dir)
    uploads.upload(2)
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "a")
    assert metrics.read_bytes().startswith((copy / "metrics.jsonl").read_bytes())
    assert not (copy / "curriculum").exists()
    monkeypatch.setattr(Flaky, "pipe_file", pipe)
    uploads.upload(2)
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "b")
    assert files_beside(copy) == files_beside(run_dir)


def test_a_part_that_is_gone_from_the_copy_is_sent_again(tmp_path, run_dir):
    """As when an upload that was given up ends after the next one."""
    write_checkpoint(run_dir, 2)
    uploads = uploads_to(tmp_path, run_dir)
    uploads.upload(2)
    store = tmp_path / "store" / "name"
    (part,) = json.loads((store / "files.json").read_text())["metrics.jsonl"]["parts"]
    (store / "parts" / part).unlink()
    append(run_dir / "metrics.jsonl", b"more")
    uploads.upload(2)
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "elsewhere")
    assert files_beside(copy) == files_beside(run_dir)


def test_a_copy_of_before_there_were_parts_comes_back(tmp_path, run_dir):
    write_checkpoint(run_dir, 2)
    shutil.copytree(run_dir, tmp_path / "store" / "name")
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "elsewhere")
    assert files_beside(copy) == files_beside(run_dir)


@pytest.mark.parametrize("what", ["a part", "a list", "a name", "a digest", "a number"])
def test_a_copy_whose_parts_are_not_what_was_sent_is_not_taken(tmp_path, run_dir, what):
    write_checkpoint(run_dir, 2)
    uploads_to(tmp_path, run_dir).upload(2)
    store = tmp_path / "store" / "name"
    listed = json.loads((store / "files.json").read_text())
    if what == "a part":
        (store / "parts" / listed["metrics.jsonl"]["parts"][0]).write_bytes(b"another")
    elif what == "a list":
        (store / "files.json").write_text("{")
    elif what == "a name":
        (store / "files.json").write_text(json.dumps(listed | {"curriculum/../../x": listed["config.yaml"]}))
    else:
        listed["metrics.jsonl"]["parts"] = ["../config.yaml" if what == "a digest" else 7]
        (store / "files.json").write_text(json.dumps(listed))
    said = refused(fetch_run, f"{url_of(tmp_path)}/name", tmp_path / "a")
    assert "is damaged" in said and not list((tmp_path / "a").glob("*")) and not (tmp_path / "x").exists()


def test_files_that_are_none_of_a_run_are_left_out(tmp_path, run_dir):
    write_checkpoint(run_dir, 2)
    uploads_to(tmp_path, run_dir).upload(2)
    path = tmp_path / "store" / "name" / "files.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps(listed | {"student/model.py": listed["config.yaml"]}))
    copy = fetch_run(f"{url_of(tmp_path)}/name", tmp_path / "a")
    assert files_beside(copy) == files_beside(run_dir)


def refused(call, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_opened_written_or_read_is_one_line(tmp_path, run_dir):
    assert "nosuch://bucket" in refused(check_writable, "nosuch://bucket")
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(check_writable, f"file://{tmp_path}/file/below")
    assert "is not a run" in refused(fetch_config, f"file://{tmp_path}/none", tmp_path)
    assert "no whole checkpoint" in refused(fetch_run, f"file://{tmp_path}/none", tmp_path / "a")
    assert "--resume" in refused(fetch_run, f"file://{tmp_path}/x/name", run_dir.parent)
    with pytest.raises(ConfigError):
        fetch_config("nosuch://bucket/run", tmp_path)
