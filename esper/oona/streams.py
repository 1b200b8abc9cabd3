"""Oona's operations on Redis Streams, each one script and so one round trip that is atomic.

Redis 6.2 or newer, or Valkey. The keys of a namespace share one hash slot. A group is created at
the beginning of its stream, whenever it turns out to be missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import ResponseError
from redis.typing import EncodableT

from esper.contracts import Topic

EntryId = tuple[int, int]  # milliseconds, sequence number

_REMEMBERED_EVENTS = 65536  # ids a stream keeps in order to recognise a repetition
_DEAD_LETTERS = 1024
_OWNED = 10_000  # entries that are looked through


@dataclass(frozen=True)
class Taken:
    """An entry that a consumer now has."""

    entry_id: str
    delivery: int  # 1 the first time that anyone gets it
    data: bytes


@dataclass(frozen=True)
class GroupReport:
    """A group as Redis sees it; ``served`` if a consumer asked for work within the lease."""

    name: str
    served: bool
    pending: int
    unread: int
    needed_from: EntryId

    @property
    def waiting(self) -> int:
        return self.pending + self.unread

    def has_done(self, entry_id: EntryId) -> bool:
        return entry_id < self.needed_from or (entry_id == self.needed_from and not self.pending)


@dataclass(frozen=True)
class StreamReport:
    """``is_broken``: entries are gone that no group had acknowledged, so Redis has lost data."""

    is_broken: bool
    groups: tuple[GroupReport, ...]


@dataclass(frozen=True)
class Span:
    """The oldest and the newest entry that must be in a stream, as far as their sender knows."""

    oldest: str = ""
    newest: str = ""


_NO_SPAN = Span()


class Streams:
    """One namespace on one server. Belongs to one event loop; every method may raise RedisError."""

    def __init__(self, client: Redis, namespace: str, consumer: str, *, lease_ms: int):
        self.bell = f"{{{namespace}}}:bell"  # the channel that says which topic has news
        self._namespace = namespace
        self._client = client
        self._consumer = consumer
        self._lease_ms = lease_ms
        self._append = self._script("append")
        self._take = self._script("take")
        self._settle = self._script("settle")
        self._survey = self._script("survey")

    async def append(
        self,
        topic: Topic,
        messages: Iterable[tuple[str, bytes]],
        span: Span = _NO_SPAN,
        *,
        trim_to: int = 0,
    ) -> list[str] | None:
        """Append pairs of event id and JSON; return an entry at or behind each one.

        Returns None and appends nothing if the stream is broken, see :class:`StreamReport`.
        """
        arguments: list[EncodableT] = [self.bell, topic.value, trim_to, _REMEMBERED_EVENTS]
        arguments += [span.oldest, span.newest]
        for event_id, data in messages:
            arguments += [event_id, data]
        keys = [self._stream(topic), self._key("seen", topic)]
        ids: list[bytes] | None = await self._append(keys, arguments)
        return None if ids is None else [entry_id.decode() for entry_id in ids]

    async def take(self, topic: Topic, group: str, count: int) -> list[Taken]:
        """Take up to ``count`` messages, which must be settled within the lease or renewed."""
        arguments: list[EncodableT] = [group, self._consumer, self._lease_ms, count]
        try:
            entries = await self._take([self._stream(topic)], arguments)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._create_group(topic, group)
            entries = await self._take([self._stream(topic)], arguments)
        return [Taken(entry_id.decode(), delivery, data) for entry_id, delivery, data in entries]

    async def join(self, topic: Topic, group: str) -> None:
        """Make the group exist, at the beginning of its stream, with this consumer in it."""
        await self._create_group(topic, group)
        await self._client.xgroup_createconsumer(self._stream(topic), group, self._consumer)

    async def settle(self, topic: Topic, group: str, verbs: Sequence[tuple[str, str]]) -> None:
        """Carry out pairs of verb and entry id, as ``lua/settle.lua`` lists them."""
        arguments: list[EncodableT] = [self.bell, topic.value, group, self._consumer]
        arguments += [self._lease_ms, _DEAD_LETTERS]
        for pair in verbs:
            arguments += pair
        try:
            await self._settle([self._stream(topic), self._key("dead", topic)], arguments)
        except ResponseError as error:
            if "NOGROUP" not in str(error):  # without its group there is nothing to settle
                raise

    async def owned(self, topic: Topic, group: str) -> list[str]:
        """Return the entries that this consumer has taken and not settled."""
        pending: Any = await self._client.xpending_range(
            self._stream(topic), group, "-", "+", _OWNED, consumername=self._consumer
        )
        return [entry["message_id"].decode() for entry in pending]

    async def survey(
        self, spans: Mapping[Topic, Span], trim_to: Mapping[Topic, int], *, forget_ms: int
    ) -> dict[Topic, StreamReport]:
        """Report on all streams as of one instant, and trim those that may be trimmed."""
        arguments: list[EncodableT] = [self._lease_ms, forget_ms]
        for topic, span in spans.items():
            arguments += [trim_to.get(topic, 0), span.oldest, span.newest]
        reports = await self._survey([self._stream(topic) for topic in spans], arguments)
        return {
            topic: StreamReport(bool(broken), tuple(_group_report(*group) for group in groups))
            for topic, (broken, groups) in zip(spans, reports, strict=True)
        }

    async def dead_letters(self, topic: Topic) -> list[bytes]:
        """Return the latest messages that were given up, oldest first."""
        entries: Any = await self._client.xrange(self._key("dead", topic))
        return [fields[b"message"] for _, fields in entries]

    async def _create_group(self, topic: Topic, group: str) -> None:
        try:
            await self._client.xgroup_create(self._stream(topic), group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _stream(self, topic: Topic) -> str:
        return self._key("stream", topic)

    def _key(self, kind: str, topic: Topic) -> str:
        return f"{{{self._namespace}}}:{kind}:{topic}"

    def _script(self, name: str) -> AsyncScript:
        source = files("esper.oona").joinpath("lua", f"{name}.lua").read_text()
        return self._client.register_script(source)


def entry_id_of(text: str) -> EntryId:
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence)


def _group_report(
    name: bytes, served: int, pending: int, unread: int, needed_from: bytes
) -> GroupReport:
    return GroupReport(
        name.decode(), bool(served), pending, unread, entry_id_of(needed_from.decode())
    )
