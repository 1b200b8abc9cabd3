"""A record of all that decisions depend on, one JSON object a line, in the order Tamiyo took it in.

A line holds either a message of the bus, or an answer that was needed to decide: which query
describes a seed's site, which kernels the library offered, and what it knows of one kernel.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from esper.contracts import Contract, FieldReport, KernelQuery, KernelRecord, OonaMessage, SeedId

QueryFor = Callable[[SeedId], KernelQuery | None]


class Library(Protocol):
    """What Tamiyo asks of Urza."""

    def query(self, query: KernelQuery) -> list[KernelRecord]: ...
    def kernel(self, artifact_id: str) -> KernelRecord: ...
    def record_field_report(self, report: FieldReport) -> None: ...


class SiteAnswer(Contract):
    seed_id: SeedId
    query: KernelQuery | None = None


class QueryAnswer(Contract):
    query: KernelQuery
    kernels: tuple[KernelRecord, ...]


class Line(Contract):
    """One line of a journal; one field is given."""

    message: OonaMessage | None = None
    site: SiteAnswer | None = None
    offer: QueryAnswer | None = None
    kernel: KernelRecord | None = None


class Journal:
    """Stands between Tamiyo and the library, and writes down what is said. Any thread.

    Appends to ``path``, in which a run that goes on leaves one journal.
    """

    def __init__(self, path: Path, library: Library, query_for: QueryFor):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._library = library
        self._query_for = query_for
        self._turn = threading.Lock()

    def note(self, message: OonaMessage) -> None:
        self._write(Line(message=message))

    def query_for(self, seed_id: SeedId) -> KernelQuery | None:
        query = self._query_for(seed_id)
        self._write(Line(site=SiteAnswer(seed_id=seed_id, query=query)))
        return query

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        kernels = self._library.query(query)
        self._write(Line(offer=QueryAnswer(query=query, kernels=tuple(kernels))))
        return kernels

    def kernel(self, artifact_id: str) -> KernelRecord:
        kernel = self._library.kernel(artifact_id)
        self._write(Line(kernel=kernel))
        return kernel

    def record_field_report(self, report: FieldReport) -> None:
        self._library.record_field_report(report)

    def _write(self, line: Line) -> None:
        text = line.model_dump_json(serialize_as_any=True, exclude_none=True)
        with self._turn, self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def read_journal(path: Path) -> Sequence[Line]:
    """Return the lines of a journal; a last line that a crash has cut off is left out.

    Raises ``ValueError`` for a line that is none.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Line.model_validate_json(line) for line in lines if line.endswith("\n")]
