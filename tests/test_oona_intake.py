"""What a process asks Redis for: what is new, once."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from esper.config import BusSettings
from esper.contracts import HealthBatch, OonaMessage, Topic
from esper.oona.inbox import Inbox
from esper.oona.intake import Intake
from esper.oona.outbox import Outbox
from esper.oona.streams import Streams, Taken

NEVER_S = 1e6
EMPTY = HealthBatch(signals=())


class Entries(Streams):
    """A stream of one group in this process, of which ``asked`` counts who looked into it."""

    def __init__(self) -> None:
        self.unread: list[str] = []
        self.asked = 0
        self.is_slow = asyncio.Event()
        self.answer = asyncio.Event()
        self.third = asyncio.Event()

    async def take(self, topic: Topic, group: str, count: int) -> list[Taken]:
        self.asked += 1
        if self.asked == 3:
            self.third.set()
        taken, self.unread = self.unread[:count], self.unread[count:]
        if self.is_slow.is_set():
            await self.answer.wait()
        return [
            Taken(entry_id, 1, OonaMessage(topic=topic, sender_id="", payload=EMPTY).to_json())
            for entry_id in taken
        ]

    async def settle(self, topic: Topic, group: str, verbs: Sequence[tuple[str, str]]) -> None:
        pass

    async def join(self, topic: Topic, group: str) -> None:
        pass

    async def owned(self, topic: Topic, group: str) -> list[str]:
        return []


class Consumer:
    """One that waits at an inbox, and the intake that serves it."""

    def __init__(self, poll_s: float = NEVER_S):
        self.entries = Entries()
        self.inbox = Inbox(Topic.SEED_HEALTH, "g", asyncio.get_running_loop())
        self.intake = Intake(
            self.inbox,
            self.entries,
            Outbox(capacity=10, telemetry_capacity=10),
            BusSettings(poll_s=poll_s),
            on_trouble=lambda error: None,
            on_settled=lambda: None,
        )

    async def finish_one(self) -> None:
        """Have the next message that is ready worked on and acknowledged."""
        delivery = self.inbox.next()
        assert delivery is not None
        self.inbox.acknowledge(delivery, after=0)
        await settled()


@pytest.fixture
async def consumer() -> AsyncIterator[Consumer]:
    waiting = Consumer()
    with waiting.inbox.hunger():
        task = asyncio.create_task(waiting.intake.run())
        await settled()
        yield waiting
        task.cancel()


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_it_looks_once_and_then_waits_for_the_bell(consumer: Consumer) -> None:
    assert consumer.entries.asked == 1
    consumer.inbox.stirred.set()  # by consumers, who know no more than it does
    await settled()
    assert consumer.entries.asked == 1


async def test_news_are_fetched_once_however_often_the_bell_tells_of_them(
    consumer: Consumer,
) -> None:
    consumer.entries.unread = ["5-0"]
    consumer.intake.ring()  # by the sender, of the same process
    await settled()
    consumer.intake.ring("5-0")
    await consumer.finish_one()
    assert consumer.entries.asked == 2
    consumer.entries.unread = ["5-1"]
    consumer.intake.ring("5-1")
    await settled()
    assert consumer.entries.asked == 3


async def test_what_was_asked_for_too_early_is_asked_for_again(consumer: Consumer) -> None:
    consumer.intake.ring()
    await settled()
    consumer.entries.unread = ["5-0"]
    consumer.intake.ring("5-0")
    await settled()
    await consumer.finish_one()
    assert consumer.entries.asked == 3


async def test_what_comes_while_it_asks_is_asked_for_afterwards(consumer: Consumer) -> None:
    consumer.entries.is_slow.set()
    consumer.intake.ring()
    await settled()
    consumer.entries.unread = ["5-0"]
    consumer.intake.ring("5-0")
    consumer.entries.answer.set()
    await settled()
    await consumer.finish_one()


async def test_a_message_that_is_given_back_rings_without_a_name(consumer: Consumer) -> None:
    consumer.entries.unread = ["5-0"]
    consumer.intake.ring("5-0")
    await settled()
    await consumer.finish_one()
    consumer.entries.unread = ["5-0"]
    consumer.intake.ring()
    await settled()
    assert not consumer.entries.unread


async def test_without_a_bell_it_looks_by_itself() -> None:
    consumer = Consumer(poll_s=1e-3)
    with consumer.inbox.hunger():
        task = asyncio.create_task(consumer.intake.run())
        await asyncio.wait_for(consumer.entries.third.wait(), 20)
        task.cancel()


async def test_as_much_as_it_asked_for_may_not_be_all(consumer: Consumer) -> None:
    consumer.entries.unread = [f"5-{number}" for number in range(100)]
    consumer.intake.ring("5-99")
    await settled()
    for _ in range(100):
        await consumer.finish_one()
        await settled()
    assert not consumer.entries.unread
