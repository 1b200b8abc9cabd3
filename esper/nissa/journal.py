"""The journal of a run: ``journal.jsonl`` in its folder, which grows while the run goes on.

One line an entry, in the order of time, so that a reader follows a run at the cost of what is new,
and a run that was killed leaves all but its last moments.
"""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pydantic import Field

from esper.contracts import Contract, EpochEvent, FieldReport, LifecycleEvent
from esper.nissa.record import (
    Alphas,
    Entry,
    KernelConsidered,
    RunHeader,
    RunRecord,
    RunRecorder,
    StepLoss,
    assemble,
)

logger = logging.getLogger(__name__)

JOURNAL, FINAL_RECORD = "journal.jsonl", "run.json"
_BATCH = 256  # entries that are serialised without a pause for other threads


class Clock(Contract):
    """Ends what one look at the run has brought."""

    duration_s: float = Field(ge=0)


_KINDS: dict[str, type[Contract]] = {
    kind.__name__: kind
    for kind in (
        *(RunHeader, Clock),
        *(StepLoss, EpochEvent, LifecycleEvent, Alphas, KernelConsidered, FieldReport),
    )
}


class Journal:
    """Writes what ``recorder`` collects into ``folder``, from a thread of its own.

    A context manager. Leaving it writes the rest; errors of the file system are logged once and
    end the journal, not the run.
    """

    def __init__(self, recorder: RunRecorder, folder: Path, *, interval_s: float = 1.0) -> None:
        self._recorder = recorder
        self._path = folder / JOURNAL
        self._interval_s = interval_s
        self._written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="esper-journal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _write(self) -> None:
        try:
            with self._path.open("w", encoding="utf-8") as file:
                _put(file, [self._recorder.header])
                while not self._ended.wait(self._interval_s):
                    self._append_news(file)
                self._append_news(file)
        except OSError as error:
            logger.warning("the run's journal ends here, and the run goes on: %s", error)

    def _append_news(self, file: IO[str]) -> None:
        entries, duration_s = self._recorder.news(self._written)
        for begin in range(0, len(entries), _BATCH):
            _put(file, entries[begin : begin + _BATCH])
        if entries:
            _put(file, [Clock(duration_s=duration_s)])
        self._written += len(entries)


class JournalReader:
    """Follows the run in ``folder``, which may be of another process, live or long dead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._position = 0
        self._header: RunHeader | None = None
        self._entries: list[Entry] = []
        self._duration_s = 0.0

    def record(self) -> RunRecord | None:
        """Return the run's final record, or else what its journal holds; None if there is nothing.

        Raises ``ValueError`` if a file does not hold what belongs there.
        """
        final = self._folder / FINAL_RECORD
        if final.exists():
            return RunRecord.from_json(final.read_bytes())
        self._catch_up()
        if self._header is None:
            return None
        return assemble(self._header, self._entries, duration_s=self._duration_s, finished=False)

    def _catch_up(self) -> None:
        try:
            with (self._folder / JOURNAL).open("rb") as file:
                file.seek(self._position)
                complete, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._position += len(complete) + len(newline)
        for line in complete.splitlines():
            self._take_in(line)

    def _take_in(self, line: bytes) -> None:
        ((name, content),) = json.loads(line).items()
        entry = _KINDS[name].model_validate(content)
        if isinstance(entry, RunHeader):
            self._header = entry
        elif isinstance(entry, Clock):
            self._duration_s = entry.duration_s
        else:
            assert isinstance(entry, Entry)
            self._entries.append(entry)


def _put(file: IO[str], contracts: "list[Entry] | list[RunHeader] | list[Clock]") -> None:
    # As RunRecord.to_json: the standard library's JSON keeps numbers that are not finite.
    for contract in contracts:
        file.write(json.dumps({type(contract).__name__: contract.model_dump()}) + "\n")
    file.flush()
