"""Exit codes of the command lines."""

import pytest

from video_opd.cluster.command_line import Parser, exit_code_of
from video_opd.errors import ConfigError, DataError, RunError


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_without_an_error_ends_with_what_it_returns(returned, code, capsys):
    assert exit_code_of(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("no such key"), 2), (DataError("a.txt"), 2), (RunError("lost"), 1)]
)
def test_an_error_is_one_line_on_stderr_and_bad_input_is_code_2(error, code, capsys):
    assert exit_code_of(failing(error)) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_a_bug_is_not_hidden():
    with pytest.raises(KeyError):
        exit_code_of(failing(KeyError("bug")))


def test_bad_arguments_are_bad_input(capsys):
    assert exit_code_of(lambda: print(Parser().parse_args(["--unknown"]))) == 2
    assert capsys.readouterr() == ("", "error: unrecognized arguments: --unknown\n")
