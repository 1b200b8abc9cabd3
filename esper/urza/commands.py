"""``esper audit``: check a library's audit log from outside, without its key and changing nothing.

``esper audit head LIBRARY > head.txt`` writes down where the log ends; kept elsewhere, that head
shows with ``esper audit verify LIBRARY --head head.txt`` whether rows were later cut off.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import esper.command_line as command_line
from esper.errors import AuditError, EsperError
from esper.urza.audit import AuditLog
from esper.urza.blobs import checked_digest
from esper.urza.database import Database, sqlite_url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    verify = actions.add_parser("verify", help="walk the chain and name the first bad row")
    verify.add_argument("--head", type=Path, help="file of a head that the log must still contain")
    head = actions.add_parser("head", help="print the hash of the newest row")
    for action, run in ((verify, _verify), (head, _head)):
        action.add_argument(
            "library",
            nargs="?",
            default=os.environ.get("URZA_URL"),
            help="folder of the library, or URL of its database (default: $URZA_URL)",
        )
        action.set_defaults(act=run)


def main(options: argparse.Namespace) -> None:
    """Run the chosen action. Exit status 1 for a log that is damaged, 2 for what cannot be read."""
    if options.library is None:
        command_line.refuse("audit", "name a library, or set URZA_URL")
    try:
        with _log(options.library) as log:
            options.act(log, options)
    except AuditError as error:
        sys.exit(f"esper audit: {error}")
    except (EsperError, ValueError, OSError) as error:
        command_line.refuse("audit", error)


def _verify(log: AuditLog, options: argparse.Namespace) -> None:
    head = None if options.head is None else checked_digest(options.head.read_text().strip())
    count = log.verify(expected_head=head)
    print(f"{count} rows, the chain holds")


def _head(log: AuditLog, _: argparse.Namespace) -> None:
    print(log.head())


@contextmanager
def _log(library: str) -> Iterator[AuditLog]:
    place = library if "://" in library else sqlite_url(Path(library) / "library.sqlite")
    database = Database(place, prepare=False, create=False)
    try:
        yield AuditLog(database)
    finally:
        database.close()
