"""The library's tables, and the transactions in which they are read and written.

Everything that is peculiar to SQLite stands in this file.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import DBAPIError

from esper.contracts import BlueprintStatus, KernelStatus
from esper.errors import LibraryError

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 60

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

# ``position`` counts in the order of arrival: rows are listed oldest first.
blueprints = Table(
    "blueprints",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("blueprint_id", String(64), nullable=False, unique=True),
    Column("contract", Text, nullable=False),
    Column("status", String, nullable=False, default=BlueprintStatus.UNVALIDATED),
    Column("log", Text, nullable=False, default=""),
)

kernels = Table(
    "kernels",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("artifact_id", String(64), nullable=False, unique=True),
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), nullable=False),
    Column("manifest", Text, nullable=False),
    Column("site_digest", String(64), nullable=False),
    Column("dtype", String, nullable=False),
    Column("device", String, nullable=False),
    Column("num_parameters", Integer, nullable=False),
    # From here on the current verdict, copied from its report.
    Column("status", String, nullable=False, default=KernelStatus.PENDING_BENCHMARKING),
    Column("report_digest", String(64)),
    Column("signature", String),
    Column("tags", Text, nullable=False, default="[]"),
    Column("latency_us", Float),
    Column("memory_bytes", Integer),
    Column("risk_score", Float),
    Index("kernels_by_fit", "status", "site_digest", "dtype", "device"),
)

# Every verdict that was ever recorded; the newest of an artifact is also in its ``kernels`` row.
reports = Table(
    "reports",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("artifact_id", ForeignKey(kernels.c.artifact_id), nullable=False, index=True),
    Column("status", String, nullable=False),
    Column("report_digest", String(64), nullable=False),
    Column("signature", String, nullable=False),
)

field_reports = Table(
    "field_reports",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("report_digest", String(64), nullable=False, unique=True),
    Column("artifact_id", ForeignKey(kernels.c.artifact_id), nullable=False),
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), nullable=False),
    Column("contract", Text, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("timestamp", Float, nullable=False),
    Column("actor", String, nullable=False),
    Column("event", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("details", Text, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)


def _make_append_only(_table: Table, connection: Connection, **_: object) -> None:
    for verb in ("UPDATE", "DELETE"):
        connection.exec_driver_sql(
            f"CREATE TRIGGER audit_log_refuses_{verb} BEFORE {verb} ON audit_log "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        )


event.listen(audit_log, "after_create", _make_append_only)


class Database:
    """One SQLite file, used by any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._reader = _engine(path)
        self._writer = self._reader.execution_options(begin="IMMEDIATE")
        # SQLite's timeout does not cover the change to WAL: without the lock 6 of 1,200 openings
        # of new libraries, 8 processes at once, failed with "database is locked".
        with _locked(path.parent):
            self._prepare()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A snapshot: what others commit meanwhile is not seen."""
        with self._errors_translated(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The one writer: all that is done inside is committed, durably, or nothing is.

        The lock is for the threads of this process: a queue is fairer and quicker than SQLite's
        polling, which is left to arbitrate between processes.
        """
        with self._turn, self._errors_translated(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        self._reader.dispose()

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise LibraryError(f"library {self._path}: {error.orig}") from error

    def _prepare(self) -> None:
        try:
            with self.write() as connection:
                self._create_or_check(connection)
        except BaseException:
            self.close()
            raise

    def _create_or_check(self, connection: Connection) -> None:
        if not inspect(connection).has_table(schema_version.name):
            metadata.create_all(connection)
            connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        version = connection.execute(select(schema_version.c.version)).scalar_one()
        if version > SCHEMA_VERSION:
            raise LibraryError(
                f"library {self._path} has schema version {version}; this Esper reads versions up "
                f"to {SCHEMA_VERSION}"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _engine(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S}, max_overflow=-1
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', '')}")
