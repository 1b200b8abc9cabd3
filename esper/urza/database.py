"""The transactions in which the library's tables are read and written, and how they are opened."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import URL, Connection, func, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError

import esper.urza.postgres as postgres
import esper.urza.sqlite as sqlite
from esper.errors import LibraryError
from esper.urza.schema import REVISION, SUPERSEDED, alembic_version, metadata, schema_version

_FIRST = "0001"  # the schema that was not yet numbered by alembic


class Database:
    """One database, used by any number of threads and processes.

    ``url`` is SQLAlchemy's: ``sqlite:////folder/library.sqlite``, ``postgresql://user@host/name``.
    An empty database is given its tables, and an older one is migrated, in one transaction each:
    of several processes that open it at once one does the work. Without ``create`` an empty one is
    left so, and without ``prepare`` any is taken as it is. Raises ValueError for a URL of another
    kind, LibraryError for a database that cannot be used: newer ones, and without ``create`` empty
    or missing ones.
    """

    def __init__(self, url: str | URL, *, prepare: bool = True, create: bool = True) -> None:
        self._url = _parsed(url)
        self._turn = threading.Lock()
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._create = create
        if self._is_sqlite and not create:
            sqlite.check_exists(self._url)
        self.name = (
            str(sqlite.file_of(self._url)) if self._is_sqlite else self._url.render_as_string()
        )
        self._reader, self._writer = (sqlite if self._is_sqlite else postgres).make_engines(
            self._url
        )
        if prepare:
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

    def now_s(self, connection: Connection) -> float:
        """Seconds since the Unix epoch, by the one clock of all who share the database."""
        if self._is_sqlite:
            return time.time()
        clock = func.extract("epoch", func.clock_timestamp())
        return float(connection.execute(select(clock)).scalar_one())

    def close(self) -> None:
        self._reader.dispose()

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            first_line = str(error.orig).partition("\n")[0]  # a server adds hints and contexts
            raise LibraryError(f"library {self.name}: {first_line}") from error

    def _prepare(self) -> None:
        try:
            with self._opening():
                with self.read() as connection:
                    ready = _revision(connection) == REVISION
                if not ready:
                    with self.write() as connection:
                        self._create_or_migrate(connection)
        except BaseException:
            self.close()
            raise

    def _opening(self) -> AbstractContextManager[None]:
        return sqlite.opening(self._url) if self._is_sqlite else nullcontext()

    def _create_or_migrate(self, connection: Connection) -> None:
        """Runs in the writer's turn: what another process did before us shows here."""
        revision = _revision(connection)
        if revision is None and not self._create:
            raise LibraryError(f"no library at {self.name}: the database is empty")
        if revision is None:
            metadata.create_all(connection)
            connection.execute(insert(schema_version).values(version=SUPERSEDED))
            connection.execute(insert(alembic_version).values(version_num=REVISION))
        elif revision < REVISION:
            from esper.urza.migrations import upgrade  # alembic, which few openings need

            try:
                upgrade(connection)
            except (ValueError, TypeError) as error:
                raise LibraryError(
                    f"library {self.name} cannot be migrated from schema revision {revision}: "
                    f"{error}"
                ) from error
        elif revision > REVISION:
            raise LibraryError(
                f"library {self.name} has schema revision {revision}; this Esper reads revisions "
                f"up to {REVISION}"
            )


def sqlite_url(path: Path) -> URL:
    """Return the URL of a file, whatever signs its path has."""
    return URL.create("sqlite", database=str(path))


def _parsed(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ValueError(f"not the URL of a database: {url!r}") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ValueError(
            f"a library is kept in sqlite or postgresql, not in {parsed.get_backend_name()}"
        )
    return parsed


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision, None for an empty database."""
    inspector = inspect(connection)
    if inspector.has_table(alembic_version.name):
        return str(connection.execute(select(alembic_version.c.version_num)).scalar_one())
    return _FIRST if inspector.has_table(schema_version.name) else None
