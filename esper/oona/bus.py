"""What every transport of Oona promises.

Publishing only appends, from any thread, and never waits. Consumers of one group share a topic's
messages: each goes to one of them, at least once, and to none twice with the same ``event_id``
once it was acknowledged. A group is created at the beginning of the topic, so it also sees what
was published before. Telemetry may be dropped, oldest first and counted; control is never
dropped.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass

from esper.contracts import Contract, OonaMessage, Topic

TELEMETRY = frozenset({Topic.SEED_HEALTH})


@dataclass(frozen=True)
class TopicStats:
    """Counts since the bus was opened, ``waiting`` as of now over all groups."""

    published: int
    dropped: int
    dead_letters: int
    waiting: int


class Oona(ABC):
    """The bus as its users see it."""

    def publish(self, topic: Topic, sender_id: str, payload: Contract) -> OonaMessage:
        """Put a payload into an envelope and send it. Any thread; never waits.

        Raises ``ValueError`` if the payload is not what the topic carries, and
        :class:`BusError` if a control topic's consumers have fallen hopelessly behind.
        """
        message = OonaMessage(topic=topic, sender_id=sender_id, payload=payload)
        self.send(message)
        return message

    @abstractmethod
    def send(self, message: OonaMessage) -> None:
        """Send a message as it is; one with a known ``event_id`` is ignored by its consumers."""

    @abstractmethod
    def subscribe(self, topic: Topic, group: str) -> AsyncGenerator[OonaMessage, None]:
        """Join a group, which exists from this call on, and yield its messages until the bus closes.

        Asking for the next message acknowledges the last one. A consumer that stops in the middle
        of one leaves it to the group's next consumer, up to the delivery limit.
        """

    def forget(self, topic: Topic, group: str) -> None:  # noqa: B027 - most have nothing to do
        """Give up a group that was one consumer's own, after that has ended. Any thread.

        A group that nobody reads for keeps others waiting, and its messages. A transport that
        forgets such groups by itself need not do anything.
        """

    @abstractmethod
    async def drained(self, topics: Collection[Topic] = tuple(Topic)) -> None:
        """Return once every group has acknowledged all that was published on ``topics``."""

    @abstractmethod
    def stats(self) -> dict[Topic, TopicStats]: ...

    @abstractmethod
    async def dead_letters(self, topic: Topic) -> list[OonaMessage]:
        """Return the latest messages that were given up after the delivery limit."""

    @abstractmethod
    def close(self) -> None:
        """End all subscriptions. Any thread; messages not yet acknowledged are kept in stats."""
