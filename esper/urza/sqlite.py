"""The library's database as one SQLite file: everything that is peculiar to SQLite."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event

from esper.errors import LibraryError
from esper.urza.folders import made_folder

_BUSY_TIMEOUT_S = 60


def file_of(url: URL) -> Path:
    if not url.database or url.database == ":memory:":
        raise ValueError(f"a library needs a file, got the database {url.database!r}")
    return Path(url.database).absolute()


def check_exists(url: URL) -> None:
    """Raise LibraryError if there is no such file, which opening it would make."""
    file = file_of(url)
    if not file.is_file():
        raise LibraryError(f"no library at {file.parent}: it has no {file.name}")


def make_engines(url: URL) -> tuple[Engine, Engine]:
    """Return one that reads and one that writes; they share their connections."""
    reader = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S}, max_overflow=-1)
    event.listen(reader, "connect", _configure)
    event.listen(reader, "begin", _begin)
    return reader, reader.execution_options(begin="IMMEDIATE")


@contextmanager
def opening(url: URL) -> Iterator[None]:
    """Let nobody else open the library meanwhile; make its folder if it is not there.

    SQLite's timeout does not cover the change to WAL: without the lock 6 of 1,200 openings of new
    libraries, 8 processes at once, failed with "database is locked".
    """
    descriptor = os.open(made_folder(file_of(url).parent), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _configure(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', '')}")
