"""What this process holds of one consumer group's messages, shared by the group's local consumers.

Decides; :mod:`esper.oona.redis` carries it out. Safe for every thread.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from esper.contracts import OonaMessage, Topic
from esper.oona.bus import TELEMETRY
from esper.oona.changes import Changes, Signal

_REMEMBERED_EVENTS = 65536  # ids of finished messages, in order to recognise a repetition
_TELEMETRY_AHEAD = 64  # messages that are fetched before anyone has asked for them


@dataclass(eq=False, slots=True)
class Delivery:
    """A message on its way through this process; several entries if Redis had lost the first."""

    message: OonaMessage
    entry_ids: list[str]


@dataclass(frozen=True, slots=True)
class Settlement:
    """A verb of ``lua/settle.lua``, to be carried out once all letters before ``after`` are sent."""

    verb: str
    entry_id: str
    after: int = 0


class Inbox:
    """Messages of one group: ready for a local consumer, being worked on, or to be settled.

    What a consumer publishes before it asks for the next message is sent before its message is
    acknowledged: ``after`` says how far the outbox must have come.
    """

    def __init__(self, topic: Topic, group: str, loop: asyncio.AbstractEventLoop):
        self.topic = topic
        self.group = group
        self.changes = Changes()  # for consumers: something is ready
        self.stirred = Signal(loop)  # for the bus: something is wanted, or to be settled
        self._ready: deque[Delivery] = deque()
        self._held: dict[str, Delivery] = {}  # by event id, ready and being worked on
        self._done: OrderedDict[str, None] = OrderedDict()
        self._settlements: list[Settlement] = []
        self._hungry = 0
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ consumers

    @contextlib.contextmanager
    def hunger(self) -> Iterator[None]:
        """Want one message for as long as the block runs."""
        with self._lock:
            self._hungry += 1
        try:
            yield
        finally:
            with self._lock:
                self._hungry -= 1
                self._shed()
            self.stirred.set()

    def next(self) -> Delivery | None:
        with self._lock:
            return self._ready.popleft() if self._ready else None

    def acknowledge(self, delivery: Delivery, after: int) -> None:
        with self._lock:
            event_id = delivery.message.event_id
            self._held.pop(event_id, None)
            self._done[event_id] = None
            if len(self._done) > _REMEMBERED_EVENTS:
                self._done.popitem(last=False)
            self._settle("ack", delivery, after)
        self.stirred.set()

    def release(self, delivery: Delivery) -> None:
        """Leave a message that was begun to whoever comes next, here or elsewhere."""
        with self._lock:
            self._held.pop(delivery.message.event_id, None)
            self._settle("release", delivery)
        self.stirred.set()

    # ------------------------------------------------------------------ the bus

    def appetite(self) -> int:
        """Return how many messages should be taken now.

        None before all that was left is back in Redis: it comes before what nobody has read.
        """
        with self._lock:
            if any(settlement.verb != "ack" for settlement in self._settlements):
                return 0
            wanted = self._hungry - len(self._ready)
            return _TELEMETRY_AHEAD if wanted > 0 and self.topic in TELEMETRY else max(0, wanted)

    def admit(self, messages: Iterable[tuple[str, OonaMessage]]) -> None:
        """Take in entry ids and messages, but none that is here or was finished here already."""
        with self._lock:
            num_ready = len(self._ready)
            for entry_id, message in messages:
                held = self._held.get(message.event_id)
                if held is not None:
                    held.entry_ids.append(entry_id)
                elif message.event_id in self._done:
                    self._settlements.append(Settlement("ack", entry_id))
                else:
                    delivery = self._held[message.event_id] = Delivery(message, [entry_id])
                    self._ready.append(delivery)
            has_news = len(self._ready) > num_ready
            self._shed()
        if has_news:  # else consumers would wake, find nothing, and have Redis asked again at once
            self.changes.announce()

    def give_back_unwanted(self) -> None:
        """Return telemetry that was fetched ahead and that nobody has asked for since."""
        with self._lock:
            if not self._hungry:
                self._give_back(len(self._ready))

    def give_back_all(self) -> None:
        """Return what nobody has begun, and release the rest: the bus closes."""
        with self._lock:
            self._give_back(len(self._ready))
            for delivery in self._held.values():
                self._settle("release", delivery)
            self._held.clear()

    def settlements(self, sent_before: int) -> list[Settlement]:
        """Take out what can be settled now that letters with lower numbers are sent."""
        with self._lock:
            due = [s for s in self._settlements if s.after <= sent_before]
            self._settlements = [s for s in self._settlements if s.after > sent_before]
            return due

    def add_settlements(self, settlements: list[Settlement]) -> None:
        """Have something settled, or what could not be settled tried again."""
        with self._lock:
            self._settlements = settlements + self._settlements

    def entries(self) -> list[str]:
        """Return all entries that this process answers for; their lease must not end."""
        with self._lock:
            held = [entry_id for held in self._held.values() for entry_id in held.entry_ids]
            return held + [settlement.entry_id for settlement in self._settlements]

    def has_settlements(self) -> bool:
        with self._lock:
            return bool(self._settlements)

    def _shed(self) -> None:
        """Keep no control message for a consumer that has gone: others may be waiting for it."""
        if self.topic not in TELEMETRY:
            self._give_back(len(self._ready) - self._hungry)

    def _give_back(self, count: int) -> None:
        for _ in range(count):
            delivery = self._ready.pop()
            del self._held[delivery.message.event_id]
            self._settle("return", delivery)

    def _settle(self, verb: str, delivery: Delivery, after: int = 0) -> None:
        self._settlements += [Settlement(verb, entry_id, after) for entry_id in delivery.entry_ids]
