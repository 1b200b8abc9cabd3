"""Have Tamiyo decide again on a recorded run: the same history gives the same decisions."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from esper.config import TamiyoSettings
from esper.contracts import (
    FieldReport,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    OonaMessage,
    SeedId,
    Topic,
)
from esper.oona import MemoryBus
from esper.tamiyo.controller import Tamiyo
from esper.tamiyo.journal import Line, read_journal
from esper.tamiyo.policy import Policy


async def replay(
    journal: Path, policy: Policy | None = None, *, settings: TamiyoSettings | None = None
) -> list[KasminaControlCommand]:
    """Return the commands that a fresh Tamiyo issues on what ``journal`` holds.

    With the policy and settings of the run they are those of the run, but for their ids; with other
    ones they tell what these would have done at each of its epochs, as far as the journal knows
    what they ask for. Raises ``LookupError`` where it does not, ``ValueError`` for a damaged line.
    """
    lines = read_journal(journal)
    bus, answers = _CommandBus(), _Answers(lines)
    tamiyo = Tamiyo(bus, answers, answers.query_for, policy, settings=settings)
    for line in lines:
        if line.message is not None:
            answers.at(line)
            await tamiyo.handle(line.message)
    return bus.commands


class _CommandBus(MemoryBus):
    """Keeps the commands; nobody listens to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[KasminaControlCommand] = []

    def send(self, message: OonaMessage) -> None:
        if message.topic is Topic.KASMINA_COMMANDS:
            assert isinstance(message.payload, KasminaControlCommand)
            self.commands.append(message.payload)


class _Answers:
    """A library that gives the answers that followed the message under way."""

    def __init__(self, lines: Sequence[Line]):
        self._lines = deque(lines)
        self._sites: dict[SeedId, KernelQuery | None] = {}
        self._offers: dict[KernelQuery, list[KernelRecord]] = {}
        self._kernels: dict[str, KernelRecord] = {}

    def at(self, message: Line) -> None:
        """Take in all answers up to the next message after ``message``."""
        while self._lines.popleft() is not message:
            pass
        while self._lines and self._lines[0].message is None:
            self._take(self._lines.popleft())

    def _take(self, line: Line) -> None:
        if line.site is not None:
            self._sites[line.site.seed_id] = line.site.query
        elif line.offer is not None:
            self._offers[line.offer.query] = list(line.offer.kernels)
        elif line.kernel is not None:
            self._kernels[line.kernel.artifact_id] = line.kernel

    def query_for(self, seed_id: SeedId) -> KernelQuery | None:
        return self._sites[seed_id]

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        return self._offers[query]

    def kernel(self, artifact_id: str) -> KernelRecord:
        return self._kernels[artifact_id]

    def record_field_report(self, report: FieldReport) -> None:
        """The run has recorded it."""
