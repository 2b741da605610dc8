"""A rank that cannot write goes through DeepSpeed's save all the same, since the others wait for it there."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner import saving
from learner.saving import taken_to_the_end, writing_on_all_ranks
from video_opd.config_file import load_demo


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


@pytest.mark.engine  # imports transformers
def test_no_rank_gives_up_while_another_writes_for_longer_than_nccl_waits(monkeypatch):
    """Ranks wait for the slowest in the barrier of a save, which checkpoint_timeout_s bounds."""
    from learner import engine

    config, waits = load_demo(["learner.num_gpus=1", "learner.dtype=float32"]), []
    store = SimpleNamespace(set_timeout=waits.append)
    monkeypatch.setattr(engine, "TCPStore", lambda *_, **__: store)
    monkeypatch.setattr(engine, "read_weights_only", lambda: None)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda *_, **options: waits.append(options["timeout"])
    )
    monkeypatch.setattr(engine.os, "environ", {})
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_distributed=lambda **_: None))
    engine._init_deepspeed(config, 1, 2, ("127.0.0.1", 1))
    most_s = max(config.checkpoint_timeout_s, config.request_timeout_s, config.start_timeout_s)
    assert len(waits) == 2 and min(waits).total_seconds() > 2 * most_s


@pytest.mark.engine  # imports transformers
@pytest.mark.parametrize(("stage", "universal", "held"), [(3, False, 0), (3, True, 1), (2, False, 1)])
def test_before_a_zero3_rank_reads_moments_it_drops_those_it_holds(stage, universal, held, tmp_path):
    """At stages 1 and 2, and from a universal checkpoint, DeepSpeed writes into those that are there."""
    from learner.engine import LearnerEngine

    found, state = [], {"master": "moments"}

    def load_checkpoint(*_: Any, **__: Any) -> tuple[str, dict]:
        found.append(len(state))
        return "path", {}

    rank: Any = LearnerEngine.__new__(LearnerEngine)
    rank._config = load_demo([f"learner.zero_stage={stage}"])
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=state))
    rank._engine = SimpleNamespace(
        optimizer=optimizer, _config=SimpleNamespace(), load_checkpoint=load_checkpoint
    )
    rank.load(tmp_path, universal)
    assert found == [held]
