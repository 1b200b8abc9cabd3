"""Runs a subcommand that must refuse."""

import pytest

from esper.cli import main


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr with which ``esper WORDS`` ends, by exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith("\n")
    assert said.count("\n") == 1
    return said[:-1]
