"""The embedded transport: bounded streams in this process, with the semantics of the others."""

import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, field

from esper.contracts import OonaMessage, Topic
from esper.errors import BusError
from esper.oona.bus import TELEMETRY, Oona, TopicStats
from esper.oona.changes import Changes

_REMEMBERED_EVENTS = 65536  # ids a group keeps in order to recognise a repetition


@dataclass
class _Group:
    unread: deque[OonaMessage] = field(default_factory=deque)
    deliveries: "OrderedDict[str, tuple[OonaMessage, int]]" = field(default_factory=OrderedDict)
    abandoned: deque[OonaMessage] = field(default_factory=deque)
    seen: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def is_new(self, event_id: str) -> bool:
        if event_id in self.seen:
            return False
        self.seen[event_id] = None
        if len(self.seen) > _REMEMBERED_EVENTS:
            self.seen.popitem(last=False)
        return True

    def waiting(self) -> int:
        return len(self.unread) + len(self.deliveries)


@dataclass
class _Stream:
    history: deque[OonaMessage]  # for groups that come later
    groups: dict[str, _Group] = field(default_factory=dict)
    dead_letters: deque[OonaMessage] = field(default_factory=lambda: deque(maxlen=1024))
    published: int = 0
    dropped: int = 0
    dead: int = 0


class MemoryBus(Oona):
    """In-process bus. One lock, held for a few appends at a time, guards all streams."""

    def __init__(self, *, capacity: int = 4096, max_deliveries: int = 5):
        self._capacity = capacity
        self._max_deliveries = max_deliveries
        self._streams = {topic: _Stream(deque(maxlen=capacity)) for topic in Topic}
        self._lock = threading.Lock()
        self._changes = Changes()
        self._closed = False

    def send(self, message: OonaMessage) -> None:
        with self._lock:
            stream = self._streams[message.topic]
            self._check_room(message.topic, stream)
            stream.published += 1
            stream.history.append(message)
            for group in stream.groups.values():
                if group.is_new(message.event_id):
                    group.unread.append(message)
        self._changes.announce()

    def subscribe(self, topic: Topic, group: str) -> AsyncGenerator[OonaMessage, None]:
        with self._lock:
            stream = self._streams[topic]
            if group not in stream.groups:
                new = stream.groups[group] = _Group()
                new.unread.extend(m for m in stream.history if new.is_new(m.event_id))
        return self._messages(topic, group)

    def forget(self, topic: Topic, group: str) -> None:
        with self._lock:
            self._streams[topic].groups.pop(group, None)
        self._changes.announce()

    async def _messages(self, topic: Topic, group: str) -> AsyncGenerator[OonaMessage, None]:
        while not self._closed:
            with self._changes.watch() as changed:
                message = self._deliver(topic, group)
                if message is None:
                    await changed.wait()
                    continue
            try:
                yield message
            except GeneratorExit:
                self._abandon(topic, group, message)
                raise
            self._acknowledge(topic, group, message)

    async def drained(self, topics: Collection[Topic] = tuple(Topic)) -> None:
        while not self._closed:
            with self._changes.watch() as changed:
                stats = self.stats()
                if not any(stats[topic].waiting for topic in topics):
                    return
                await changed.wait()

    def stats(self) -> dict[Topic, TopicStats]:
        with self._lock:
            return {
                topic: TopicStats(
                    published=stream.published,
                    dropped=stream.dropped,
                    dead_letters=stream.dead,
                    waiting=sum(group.waiting() for group in stream.groups.values()),
                )
                for topic, stream in self._streams.items()
            }

    async def dead_letters(self, topic: Topic) -> list[OonaMessage]:
        with self._lock:
            return list(self._streams[topic].dead_letters)

    def close(self) -> None:
        self._closed = True
        self._changes.announce()

    def _check_room(self, topic: Topic, stream: _Stream) -> None:
        for name, group in stream.groups.items():
            if len(group.unread) < self._capacity:
                continue
            if topic not in TELEMETRY:
                raise BusError(
                    f"group '{name}' has {len(group.unread)} unread messages on {topic}, "
                    "which is all that the bus holds"
                )
            group.unread.popleft()
            stream.dropped += 1

    def _deliver(self, topic: Topic, name: str) -> OonaMessage | None:
        with self._lock:
            stream = self._streams[topic]
            group = stream.groups[name]
            while group.abandoned or group.unread:
                message = (group.abandoned or group.unread).popleft()
                _, count = group.deliveries.pop(message.event_id, (message, 0))
                if count < self._max_deliveries:
                    group.deliveries[message.event_id] = (message, count + 1)
                    return message
                stream.dead += 1
                stream.dead_letters.append(message)
            return None

    def _acknowledge(self, topic: Topic, name: str, message: OonaMessage) -> None:
        with self._lock:
            self._streams[topic].groups[name].deliveries.pop(message.event_id, None)
        self._changes.announce()

    def _abandon(self, topic: Topic, name: str, message: OonaMessage) -> None:
        with self._lock:
            self._streams[topic].groups[name].abandoned.append(message)
        self._changes.announce()
