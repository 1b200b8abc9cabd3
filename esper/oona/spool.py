"""The local log that takes over while Redis is away: JSON Lines, one message a line.

It is for reading. What is delivered afterwards is delivered from memory; if the process dies
before Redis is back, :func:`read_spool` gives the messages to send again: their event ids keep
them from being applied twice.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from esper.contracts import OonaMessage

logger = logging.getLogger(__name__)


def default_spool_folder() -> Path:
    """Where programs keep their logs on this system."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "esper"


class Spool:
    """Appends messages to ``path``; a full file becomes ``path`` + ``.1`` and a new one begins.

    So at most twice ``limit_bytes`` are used. A disk that cannot be written to is told in one log
    line; it stops nothing. One thread at a time.
    """

    def __init__(self, path: Path, *, limit_bytes: int):
        self.path = path
        self._limit_bytes = limit_bytes
        self._has_failed = False

    def write(self, messages: Iterable[OonaMessage]) -> None:
        lines = b"".join(message.to_json() + b"\n" for message in messages)
        if not lines:
            return
        try:
            self._append(lines)
        except OSError as error:
            if not self._has_failed:
                logger.warning("the log at %s cannot be written: %s", self.path, error)
            self._has_failed = True

    def _append(self, lines: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size + len(lines) > self._limit_bytes:
            self.path.replace(f"{self.path}.1")
        with self.path.open("ab") as log:
            log.write(lines)


def read_spool(path: Path) -> Iterator[OonaMessage]:
    """Yield the messages of a log. A last line that a crash cut short is left out."""
    with path.open("rb") as log:
        for line in log:
            try:
                message = OonaMessage.from_json(line)
            except ValidationError:
                if line.endswith(b"\n"):
                    raise
                return
            yield message
