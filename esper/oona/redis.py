"""The transport over Redis Streams: the same bus for several processes and machines.

A thread of its own, with an event loop of its own, does all that touches the network, so the bus
works with any loop of the user's, or with none. Publishing appends to the outbox; a consumer waits
at an inbox; a courier and one intake for each inbox move messages between these and Redis.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import AsyncGenerator, Collection, Coroutine
from typing import TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from esper.config import BusSettings
from esper.contracts import OonaMessage, Topic
from esper.errors import BusError
from esper.oona.address import parse_address
from esper.oona.bus import Oona, TopicStats
from esper.oona.changes import Changes, Signal
from esper.oona.courier import UNREACHABLE, Courier
from esper.oona.inbox import Delivery, Inbox
from esper.oona.intake import Intake
from esper.oona.outbox import Outbox
from esper.oona.spool import Spool, default_spool_folder
from esper.oona.streams import StreamReport, Streams

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_MIN_SERVER = (6, 2)
_LOOK_AGAIN_S = 0.02  # while someone waits for other processes to finish


class _ClosedError(BusError):
    def __init__(self) -> None:
        super().__init__("the bus is closed")


class RedisBus(Oona):
    """A bus on the Redis server at ``url``; see :func:`esper.oona.address.parse_address`.

    Processes share the topics of a namespace, and the members of a group share its messages.
    Raises :class:`BusError` if the server does not answer within ``settings.timeout_s``.
    """

    def __init__(self, url: str, settings: BusSettings | None = None):
        self._settings = settings or BusSettings()
        self._address = parse_address(url)
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._outbox = Outbox(
            capacity=self._settings.capacity, telemetry_capacity=self._settings.telemetry_capacity
        )
        self._inboxes: dict[tuple[Topic, str], Inbox] = {}
        self._intakes: dict[Intake, asyncio.Task[None]] = {}
        self._reports: dict[Topic, StreamReport] = {}
        self._changes = Changes()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._mail = Signal(self._loop)
        self._ending = asyncio.Event()
        self._connected: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._serve, name="esper-oona", daemon=True)
        self._thread.start()
        self._connected.result()

    # ------------------------------------------------------------------ any thread

    def send(self, message: OonaMessage) -> None:
        """See :meth:`Oona.send`; once the bus is closed, nothing is sent any more."""
        if self._closed:
            return
        self._outbox.put(message)
        self._mail.set()

    def subscribe(self, topic: Topic, group: str) -> AsyncGenerator[OonaMessage, None]:
        with self._lock:
            inbox = self._inboxes.get((topic, group))
            if inbox is None:
                inbox = self._inboxes[topic, group] = Inbox(topic, group, self._loop)
                with contextlib.suppress(RuntimeError):  # the bus is closed
                    self._loop.call_soon_threadsafe(self._open, inbox)
        return self._messages(inbox)

    async def drained(self, topics: Collection[Topic] = tuple(Topic)) -> None:
        """See :meth:`Oona.drained`; groups that nobody serves any more are not waited for."""
        while not self._closed:
            with self._changes.watch() as changed:
                with contextlib.suppress(_ClosedError):
                    if await self._on_own_loop(self._is_drained(topics)):
                        return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_AGAIN_S)

    def stats(self) -> dict[Topic, TopicStats]:
        """Return what this process has published and given up; ``waiting`` is as last heard.

        Redis is asked about once a second.
        """
        stats = {}
        for topic in Topic:
            published, dropped, unsent = self._outbox.counts(topic)
            report = self._reports.get(topic)
            waiting = sum(group.waiting for group in report.groups) if report else 0
            buried = sum(i.buried for i in list(self._intakes) if i.inbox.topic is topic)
            stats[topic] = TopicStats(published, dropped, buried, waiting + unsent)
        return stats

    async def dead_letters(self, topic: Topic) -> list[OonaMessage]:
        letters = await self._on_own_loop(self._streams.dead_letters(topic))
        return [OonaMessage.from_json(data) for data in letters]

    def close(self) -> None:
        """End all subscriptions. Waits, ``close_timeout_s`` at most, until Redis has everything."""
        self._closed = True
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(2 * self._settings.close_timeout_s)
        self._wake_consumers()

    async def _messages(self, inbox: Inbox) -> AsyncGenerator[OonaMessage, None]:
        while (delivery := await self._next(inbox)) is not None:
            try:
                yield delivery.message
            except GeneratorExit:
                inbox.release(delivery)
                raise
            inbox.acknowledge(delivery, after=self._outbox.horizon())

    async def _next(self, inbox: Inbox) -> Delivery | None:
        with inbox.hunger():
            while not self._closed:
                with inbox.changes.watch() as changed:
                    delivery = inbox.next()
                    if delivery is not None:
                        return delivery
                    inbox.stirred.set()
                    await changed.wait()
        return None

    async def _on_own_loop(self, work: Coroutine[None, None, _T]) -> _T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise _ClosedError from None
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _ClosedError from None  # the bus was closed under it, not the caller cancelled

    def _wake_consumers(self) -> None:
        self._changes.announce()
        for inbox in self._every_inbox():
            inbox.changes.announce()

    def _every_inbox(self) -> list[Inbox]:
        with self._lock:
            return list(self._inboxes.values())

    # ------------------------------------------------------------------ the bus's own thread

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._work())
        except Exception as failure:
            if self._connected.done():
                logger.exception("the bus failed, and is closed")
            else:
                self._connected.set_exception(failure)
        finally:
            self._closed = True
            self._wake_consumers()

    async def _work(self) -> None:
        client = self._client()
        try:
            await self._greet(client)
            self._set_up(client)
            self._connected.set_result(None)
            await self._run_tasks(client)
            await client.connection_pool.disconnect()  # of an answer that came too late
            await self._finish()
        finally:
            await client.aclose()

    def _set_up(self, client: Redis) -> None:
        settings = self._settings
        self._streams = Streams(
            client,
            self._address.namespace,
            self._consumer,
            lease_ms=round(1e3 * settings.lease_s),
        )
        folder = settings.spool_folder or default_spool_folder()
        self._courier = Courier(
            self._streams,
            self._outbox,
            Spool(folder / f"oona-{self._consumer}.jsonl", limit_bytes=settings.spool_limit_bytes),
            settings,
            mail=self._mail,
            place=self._address.shown,
            on_sending=self._ring,
            on_sent=self._stir_those_who_wait,
            is_taking=lambda: not any(intake.in_trouble for intake in self._intakes),
        )

    async def _run_tasks(self, client: Redis) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            courier = self._tasks.create_task(self._courier.run(self._reports.update))
            listener = self._tasks.create_task(self._listen(client))
            await self._ending.wait()
            await _end({courier, listener, *self._intakes.values()})

    def _open(self, inbox: Inbox) -> None:
        if self._ending.is_set():
            return
        intake = Intake(
            inbox,
            self._streams,
            self._outbox,
            self._settings,
            on_trouble=self._courier.note_trouble,
            on_settled=self._changes.announce,
        )
        self._intakes[intake] = self._tasks.create_task(intake.run())

    async def _listen(self, client: Redis) -> None:
        """Tell intakes when Redis has news on their topic; without news they look by themselves."""
        while True:
            with contextlib.suppress(*UNREACHABLE):
                async with client.pubsub(ignore_subscribe_messages=True) as bell:
                    await bell.subscribe(self._streams.bell)
                    for intake in self._intakes:
                        intake.ring()
                    while True:
                        news = await bell.get_message(timeout=self._settings.poll_s)
                        if news is not None:
                            self._hear(news["data"].decode())
            await asyncio.sleep(self._settings.poll_s)

    def _ring(self, topic: Topic) -> None:
        """Let this process ask at once, on another connection, for what it is about to send.

        Most often that is just after Redis has got it; where it is too early, the bell rings again.
        """
        for intake in self._intakes:
            if intake.inbox.topic is topic:
                intake.ring()

    def _hear(self, news: str) -> None:
        topic, _, entry_id = news.partition(" ")
        for intake in self._intakes:
            if intake.inbox.topic == topic:
                intake.ring(entry_id)

    def _stir_those_who_wait(self) -> None:
        for inbox in self._every_inbox():
            if inbox.has_settlements():
                inbox.stirred.set()

    async def _is_drained(self, topics: Collection[Topic]) -> bool:
        if self._outbox.has_unsent(topics):
            return False
        try:
            self._reports.update(await self._courier.survey())
        except UNREACHABLE as error:
            self._courier.note_trouble(error)
            return False
        ours = {(inbox.topic, inbox.group) for inbox in self._every_inbox()}
        seen = set()
        for topic in topics:
            if self._reports[topic].is_broken:
                return False
            for group in self._reports[topic].groups:
                seen.add((topic, group.name))
                if group.waiting and (group.served or (topic, group.name) in ours):
                    return False
        return not {(topic, group) for topic, group in ours - seen if topic in topics}

    async def _finish(self) -> None:
        """Send the rest and give back what is held, as far as Redis is there to take it."""
        try:
            async with asyncio.timeout(self._settings.close_timeout_s):
                await self._courier.deliver()
                for intake in self._intakes:
                    intake.inbox.give_back_all()
                    await intake.settle()
        except UNREACHABLE as error:  # a TimeoutError is an OSError
            self._courier.note_trouble(error)
            kept = [topic.value for topic in Topic if self._outbox.has_unsent([topic])]
            if kept:
                logger.warning("the bus was closed before messages on %s were sent", kept)

    def _client(self) -> Redis:
        return Redis.from_url(
            self._address.url,
            socket_timeout=self._settings.timeout_s,
            socket_connect_timeout=self._settings.timeout_s,
            retry=Retry(NoBackoff(), 0),  # whether to try again is decided here
            client_name="esper-oona",
        )

    async def _greet(self, client: Redis) -> None:
        try:
            info = await client.info("server")
        except UNREACHABLE as error:
            raise BusError(f"cannot reach Redis at {self._address.shown}: {error}") from error
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _MIN_SERVER:
            raise BusError(f"Redis at {self._address.shown} is {version}, 6.2 is needed")


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until they are: asyncio.wait_for, in redis-py, may swallow a cancellation.

    That is so before Python 3.12, when what it waits for is done at the same moment.
    """
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.1)
