"""The library's database on a PostgreSQL server: everything that is peculiar to PostgreSQL."""

from sqlalchemy import URL, Connection, Engine, create_engine, event

from esper.errors import LibraryError

# Any number, as long as nothing else in the database locks by it: the letters of "Urza".
_WRITERS_LOCK = 0x55727A61


def make_engines(url: URL) -> tuple[Engine, Engine]:
    """Return one that reads and one that writes; they share their connections."""
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, pool_pre_ping=True, max_overflow=-1)
    except ModuleNotFoundError as error:
        raise LibraryError(
            f"a library on PostgreSQL needs {error.name}: pip install 'esper-torch[postgres]'"
        ) from error
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    writer = engine.execution_options(isolation_level="READ COMMITTED")
    event.listen(writer, "begin", _take_turn)
    return reader, writer


def _take_turn(connection: Connection) -> None:
    """Let one transaction write at a time, as SQLite does: the audit log has one end.

    It has to be READ COMMITTED, or what it reads would be older than its turn.
    """
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")
