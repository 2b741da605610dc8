"""Fixtures of the tests of cluster files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch
from video_opd import ROOT


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a key and a token, in the root of the checkout."""
    home = tmp_path / "home"
    for file in (".ssh/id_ed25519", ".ray/auth_token"):
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)
    return home


@pytest.fixture
def check(
    user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Any], tuple[int, list[str], list[str]]]:
    """Runs --check-cluster on documents or text.

    Returns (exit code, lines on stdout, lines on stderr without the file's name)."""

    def check(content: Any) -> tuple[int, list[str], list[str]]:
        file = tmp_path / "machines.yaml"
        if not isinstance(content, str):
            content = yaml.safe_dump_all(content if isinstance(content, list) else [content])
        file.write_text(content)
        capsys.readouterr()
        code = launch.main(["--check-cluster", str(file)])
        captured = capsys.readouterr()
        return (
            code,
            captured.out.splitlines(),
            [line.replace(f"{file}: ", "") for line in captured.err.splitlines()],
        )

    return check
