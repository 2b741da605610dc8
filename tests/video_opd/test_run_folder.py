"""A run folder belongs to one process at a time."""

from pathlib import Path

import pytest

from video_opd.config_file import load_config
from video_opd.errors import ConfigError
from video_opd.files.run_folder import locked, new_run_folder

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def config(runs: Path, *more: str):
    return load_config(DEMO, [f"runs_dir={runs}", *more])


def test_a_folder_that_a_run_writes_to_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match="a run is already writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    with new_run_folder(config(tmp_path)) as first, new_run_folder(config(tmp_path)) as second:
        assert first != second
        (first / "config.yaml").touch()
    assert list(tmp_path.iterdir()) == [first], "one that nothing was written to is gone"


def test_a_name_that_is_taken_and_a_place_that_is_none_are_one_line(tmp_path):
    with new_run_folder(config(tmp_path, "run_name=a")) as folder:
        (folder / "config.yaml").touch()
        with (
            pytest.raises(ConfigError, match="a exists: choose another run_name, or continue it with"),
            new_run_folder(config(tmp_path, "run_name=a")),
        ):
            pass
        (folder / "file").touch()
        with (
            pytest.raises(ConfigError, match="no folder can be made there"),
            new_run_folder(config(folder / "file")),
        ):
            pass


def test_a_name_whose_start_was_killed_before_it_wrote_anything_is_free(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").touch()
    with new_run_folder(config(tmp_path, "run_name=a")) as folder:
        assert folder == tmp_path / "a"
        with (
            pytest.raises(ConfigError, match="a run is already writing to"),
            new_run_folder(config(tmp_path, "run_name=a")),
        ):
            pass
        assert (folder / ".lock").exists(), "another start that is refused leaves it alone"
