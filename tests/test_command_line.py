"""Options are refused before anything is done, and other libraries do not talk into our log."""

import subprocess
import sys
from pathlib import Path

import pytest

from esper.cli import main


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["forge", "--tezzeret", "-1"], "--tezzeret: must be a whole number of at least 0"),
        (["forge", "--lease-s", "0"], "--lease-s: must be a number above 0"),
        (["forge", "--poll-s", "nan"], "--poll-s: must be a number above 0"),
        (["watch", ".", "--port", "65536"], "--port: must be a port, 0 to 65535, got '65536'"),
        (["urza", "serve", "new", "--port", "x"], "--port: must be a port, 0 to 65535, got 'x'"),
        (["urza", "serve", "new", "--max-body-mib", "0"], "must be a whole number of at least 1"),
        (["tamiyo", "status", "--timeout-s", "-1"], "--timeout-s: must be a number above 0"),
        (["demo", "--seed", "9223372036854775808"], "--seed: must be a whole number from 0 to"),
        (["demo", "--metrics-port", "-1"], "--metrics-port: must be a port, 0 to 65535"),
    ],
)
def test_an_impossible_option_is_refused(
    words: list[str],
    because: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert because in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_command_is_ours_and_the_warnings_of_others() -> None:
    code = """
import logging
from esper.command_line import configure_logging
configure_logging("%(name)s %(levelname)s", logging.DEBUG)
for name in ("esper.forge_worker", "httpx", "uvicorn.error"):
    logging.getLogger(name).debug("")
    logging.getLogger(name).info("")
    logging.getLogger(name).warning("")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "esper.forge_worker DEBUG",
        "esper.forge_worker INFO",
        "esper.forge_worker WARNING",
        "httpx WARNING",
        "uvicorn.error WARNING",
    ]
