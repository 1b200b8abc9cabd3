"""What was published and may still have to be sent: bounded, and safe for every thread.

A control message stays until every group that is being served has acknowledged it, so that it can
be sent again if Redis loses its data. Telemetry leaves with the attempt to send it.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from esper.contracts import OonaMessage, Topic
from esper.errors import BusError
from esper.oona.bus import TELEMETRY
from esper.oona.streams import GroupReport, Span, entry_id_of


@dataclass(eq=False, slots=True)
class Letter:
    """A published message on its way."""

    number: int  # in the order of publishing, over all topics
    message: OonaMessage
    entry_id: str = ""  # in the stream, once sent
    is_logged: bool = False


@dataclass(eq=False)
class _Line:
    unsent: deque[Letter] = field(default_factory=deque)
    sent: deque[Letter] = field(default_factory=deque)
    slowest_group: str | None = None  # that is being served and has not acknowledged everything
    published: int = 0
    dropped: int = 0


class Outbox:
    """One line of letters for each topic; ``outage`` says why nothing is being sent, if so."""

    def __init__(self, *, capacity: int, telemetry_capacity: int):
        self.outage: str | None = None
        self._capacity = capacity
        self._telemetry_capacity = telemetry_capacity
        self._lines = {topic: _Line() for topic in Topic}
        self._next_number = 0
        self._lock = threading.Lock()

    def put(self, message: OonaMessage) -> None:
        """Append a message. Raises :class:`BusError` if a control topic's line is full."""
        with self._lock:
            line = self._lines[message.topic]
            self._make_room(message.topic, line)
            line.published += 1
            line.unsent.append(Letter(self._next_number, message))
            self._next_number += 1

    def unsent(self, topic: Topic, most: int) -> list[Letter]:
        """Return the oldest letters that wait; telemetry is taken out of its line."""
        with self._lock:
            line = self._lines[topic]
            if topic in TELEMETRY:
                return [line.unsent.popleft() for _ in range(min(most, len(line.unsent)))]
            return list(itertools.islice(line.unsent, most))

    def note_sent(self, topic: Topic, letters: list[Letter], entry_ids: Iterable[str]) -> None:
        """Keep what was sent, the first ones of the line, until it is acknowledged."""
        if topic in TELEMETRY:
            return
        with self._lock:
            line = self._lines[topic]
            for letter, entry_id in zip(letters, entry_ids, strict=True):
                letter.entry_id = entry_id
                line.sent.append(line.unsent.popleft())

    def note_dropped(self, topic: Topic, count: int) -> None:
        with self._lock:
            self._lines[topic].dropped += count

    def note_groups(self, topic: Topic, groups: Iterable[GroupReport]) -> None:
        """Let go of what all groups that are being served have acknowledged."""
        served = [group for group in groups if group.served]
        with self._lock:
            line = self._lines[topic]
            line.slowest_group = None
            if served:
                slowest = min(served, key=lambda group: group.needed_from)
                while line.sent and slowest.has_done(entry_id_of(line.sent[0].entry_id)):
                    line.sent.popleft()
                if slowest.waiting:
                    line.slowest_group = slowest.name

    def send_again(self, topic: Topic) -> int:
        """Have all that is unacknowledged sent once more, in order; return how much that is."""
        with self._lock:
            line = self._lines[topic]
            again = len(line.sent)
            line.unsent.extendleft(reversed(line.sent))
            line.sent.clear()
            return again

    def span(self, topic: Topic) -> Span:
        """Return which entries must be in the stream."""
        with self._lock:
            sent = self._lines[topic].sent
            return Span(sent[0].entry_id, sent[-1].entry_id) if sent else Span()

    def unlogged(self) -> list[OonaMessage]:
        """Return the control messages that wait and are not in the local log; now they are."""
        with self._lock:
            letters = [
                letter
                for topic in Topic
                if topic not in TELEMETRY
                for letter in self._lines[topic].unsent
                if not letter.is_logged
            ]
            for letter in letters:
                letter.is_logged = True
            return [letter.message for letter in letters]

    def has_unsent(self, topics: Iterable[Topic]) -> bool:
        with self._lock:
            return any(self._lines[topic].unsent for topic in topics)

    def is_half_full(self) -> bool:
        with self._lock:
            return any(2 * len(line.sent) >= self._capacity for line in self._lines.values())

    def horizon(self) -> int:
        """Return the number that the next control letter will have."""
        with self._lock:
            return self._next_number

    def sent_before(self) -> int:
        """Return the number of the oldest control letter that is not sent."""
        with self._lock:
            return min(
                (
                    line.unsent[0].number
                    for topic, line in self._lines.items()
                    if line.unsent and topic not in TELEMETRY
                ),
                default=self._next_number,
            )

    def counts(self, topic: Topic) -> tuple[int, int, int]:
        """Return how many were published, dropped, and are not sent yet."""
        with self._lock:
            line = self._lines[topic]
            return line.published, line.dropped, len(line.unsent)

    def _make_room(self, topic: Topic, line: _Line) -> None:
        if topic in TELEMETRY:
            if len(line.unsent) >= self._telemetry_capacity:
                line.unsent.popleft()
                line.dropped += 1
            return
        held = len(line.unsent) + len(line.sent)
        if held < self._capacity:
            return
        if line.sent and line.slowest_group is None:
            line.sent.popleft()  # it is in Redis, and nobody is there to acknowledge it
            return
        reason = self.outage or (
            f"group '{line.slowest_group}' falls behind"
            if line.slowest_group
            else "they are published faster than they can be sent"
        )
        raise BusError(
            f"{held} unacknowledged messages on {topic}, which is all that the bus holds: {reason}"
        )
