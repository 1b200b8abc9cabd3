"""The audit log: what happened in the library, in an order that cannot be changed unnoticed.

Each row carries the hash of the one before it, so an edited, removed or moved row breaks the
chain. Whoever can write the whole file could forge the whole chain or cut off its end: against
that, keep a head elsewhere (``export_jsonl`` returns it) and pass it to ``verify``.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from esper.contracts import Contract, canonical_json
from esper.errors import AuditError
from esper.urza.database import Database
from esper.urza.schema import audit_log

GENESIS = "0" * 64  # stands for the hash before the first row


class AuditEntry(Contract):
    """One event. Its hash is its digest."""

    seq: int  # 1, 2, 3, ...
    timestamp: float  # seconds since the Unix epoch
    actor: str  # the role that caused the event
    event: str
    subject: str  # what the event happened to
    details: dict[str, Any]
    previous_hash: str


class AuditLog:
    """Appends in the caller's transaction; reads and verifies in its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(
        self,
        connection: Connection,
        *,
        actor: str,
        event: str,
        subject: str,
        details: dict[str, Any],
    ) -> None:
        """Add a row to the writing transaction that makes the change it records."""
        seq, previous_hash = _last(connection)
        entry = AuditEntry(
            seq=seq + 1,
            timestamp=time.time(),
            actor=actor,
            event=event,
            subject=subject,
            details=details,
            previous_hash=previous_hash,
        )
        text = canonical_json(details).decode()
        connection.execute(
            insert(audit_log).values(
                **entry.model_dump(exclude={"details"}), details=text, hash=entry.digest()
            )
        )

    def head(self) -> str:
        """Return the hash of the newest row, or GENESIS if there is none."""
        with self._database.read() as connection:
            return _last(connection)[1]

    def entries(self) -> list[AuditEntry]:
        """Return all rows in order, unverified."""
        with self._database.read() as connection:
            return [_entry(row) for row in _rows(connection)]

    def verify(self, *, expected_head: str | None = None) -> int:
        """Walk the chain and return its length; raise AuditError naming the first bad row.

        ``expected_head`` is a head kept from earlier: the log may have grown since, but must
        still contain it.
        """
        seq, last_hash = 0, GENESIS
        head_found = expected_head in (None, GENESIS)
        with self._database.read() as connection:
            for row in _rows(connection):
                _verify_link(row, seq + 1, last_hash)
                seq, last_hash = row.seq, row.hash
                head_found = head_found or last_hash == expected_head
        if not head_found:
            raise AuditError(
                f"audit log: it ends at row {seq} without the expected head {expected_head}; "
                "later rows were cut off, or the chain was written anew"
            )
        return seq

    def export_jsonl(self, path: Path) -> str:
        """Write one canonical JSON object a line, hash included, and return the head."""
        head = GENESIS
        with self._database.read() as connection, path.open("wb") as file:
            for row in _rows(connection):
                head = row.hash
                entry = _entry(row).model_dump(mode="json")
                file.write(canonical_json(entry | {"hash": head}) + b"\n")
        return head


def _last(connection: Connection) -> tuple[int, str]:
    newest = select(audit_log.c.seq, audit_log.c.hash).order_by(audit_log.c.seq.desc()).limit(1)
    row = connection.execute(newest).first()
    return (row.seq, row.hash) if row else (0, GENESIS)


def _rows(connection: Connection) -> Iterator[Row[Any]]:
    return iter(connection.execute(select(audit_log).order_by(audit_log.c.seq)))


def _entry(row: Row[Any]) -> AuditEntry:
    fields = row._asdict()
    del fields["hash"]
    try:
        return AuditEntry(**fields | {"details": json.loads(row.details)})
    except ValueError as error:
        raise AuditError(f"audit log: row {row.seq} cannot be read: {error}") from error


def _verify_link(row: Row[Any], seq: int, previous_hash: str) -> None:
    if row.seq != seq:
        raise AuditError(f"audit log: row {seq} is missing, row {row.seq} stands in its place")
    entry = _entry(row)
    if _digest(entry) != row.hash:
        raise AuditError(f"audit log: row {seq} was edited, its hash does not match its content")
    if entry.previous_hash != previous_hash:
        raise AuditError(f"audit log: row {seq} does not follow row {seq - 1}, the chain is broken")


def _digest(entry: AuditEntry) -> str | None:
    try:
        return entry.digest()
    except ValueError:
        return None  # a number that canonical JSON does not have: nothing that we wrote
