"""A rank that cannot write goes through DeepSpeed's save all the same, since the others wait for it there."""

from pathlib import Path
from typing import Any

import pytest

from learner import saving
from learner.saving import taken_to_the_end, writing_on_all_ranks


class Engine:
    """What writes in DeepSpeed's engine, on a disk that fills up in one of its writes."""

    def __init__(self, fails: str):
        self.checkpoint_engine, self._fails = self, fails
        self.passed: list[str] = []

    def _write(self, name: str) -> None:
        if name == self._fails:
            raise OSError(28, "No space left on device")

    def save(self, state: Any, path: str) -> None:
        self._write("save")

    def _copy_recovery_script(self, path: str) -> None:
        self._write("_copy_recovery_script")

    def save_checkpoint(self) -> None:
        self.checkpoint_engine.save({}, "state")
        self._copy_recovery_script("state")
        self.passed.append("barrier")


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """A group of one rank."""

    def gather(reasons: list[str], own: str) -> None:
        reasons[:] = [own]

    monkeypatch.setattr(saving.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(saving.distributed, "all_gather_object", gather)


@pytest.mark.parametrize("fails", ["save", "_copy_recovery_script"])
def test_a_write_that_fails_raises_when_all_ranks_are_through(fails, tmp_path):
    engine = Engine(fails)
    with pytest.raises(OSError, match=r"rank 0: .*No space left"), writing_on_all_ranks(engine, tmp_path):
        engine.save_checkpoint()
    assert engine.passed == ["barrier"]


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_written(tmp_path):
    engine, file = Engine(""), tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"rank 0: .*file"), writing_on_all_ranks(engine, Path(file, "below")):
        engine.save_checkpoint()
    assert not engine.passed


def test_what_is_written_whole_raises_nothing_and_leaves_the_engine_as_it_was(tmp_path):
    engine = Engine("")
    with writing_on_all_ranks(engine, tmp_path / "state"):
        engine.save_checkpoint()
    assert engine.passed == ["barrier"] and (tmp_path / "state").is_dir()
    assert vars(engine).keys() == vars(Engine("")).keys()


def test_what_fails_on_one_rank_still_makes_the_passes_that_the_others_make():
    passes = iter(range(5))
    with pytest.raises(ZeroDivisionError), taken_to_the_end(passes) as named:
        assert 1 // next(named)
    assert not list(passes)
