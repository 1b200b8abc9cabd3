"""Serves one inbox: takes messages from Redis for its consumers, and settles what they finished."""

import asyncio
import logging
import time
from collections.abc import Callable

from pydantic import ValidationError

from esper.config import BusSettings
from esper.contracts import OonaMessage
from esper.oona.courier import FIRST_PAUSE_S, UNREACHABLE
from esper.oona.inbox import Inbox, Settlement
from esper.oona.outbox import Outbox
from esper.oona.streams import EntryId, Streams, Taken, entry_id_of

logger = logging.getLogger(__name__)

_NONE: EntryId = (0, 0)


class Intake:
    """One task for one inbox. Belongs to one event loop.

    ``on_trouble`` is told when Redis fails, ``on_settled`` when something was settled.

    Attributes: ``buried``, how many messages it has given up, and ``in_trouble``, whether Redis has
    failed it the last time.
    """

    def __init__(
        self,
        inbox: Inbox,
        streams: Streams,
        outbox: Outbox,
        settings: BusSettings,
        *,
        on_trouble: Callable[[Exception], None],
        on_settled: Callable[[], None],
    ):
        self.inbox = inbox
        self.buried = 0
        self.in_trouble = False
        self._streams = streams
        self._outbox = outbox
        self._settings = settings
        self._on_trouble = on_trouble
        self._on_settled = on_settled
        self._has_news = True  # whether there may be something that was not read
        self._read_to: EntryId = _NONE
        self._is_unsure = True  # whether Redis gave us something that never arrived
        self._renewed_s = time.monotonic()

    async def run(self) -> None:
        """Serve the inbox for as long as the task lives."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await self._serve()
                pause_s = FIRST_PAUSE_S
                self.in_trouble = False
            except UNREACHABLE as error:
                self._is_unsure = self._has_news = self.in_trouble = True
                self._on_trouble(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._settings.poll_s)
            else:
                if not await self.inbox.stirred.wait(self._settings.poll_s):
                    self._has_news = True  # for all we know

    def ring(self, entry_id: str = "") -> None:
        """There is news on the topic: an entry, if it is named, that may have been read since."""
        if not entry_id or entry_id_of(entry_id) > self._read_to:
            self._has_news = True
            self.inbox.stirred.set()

    async def settle(self) -> None:
        """Tell Redis what was finished or left, as far as the outbox allows."""
        due = self.inbox.settlements(self._outbox.sent_before())
        if not due:
            return
        try:
            await self._streams.settle(
                self.inbox.topic, self.inbox.group, [(s.verb, s.entry_id) for s in due]
            )
        except BaseException:
            self.inbox.add_settlements(due)
            raise
        self._on_settled()

    async def _serve(self) -> None:
        if self._is_unsure:
            await self._make_sure()
        await self._renew_if_due()
        await self.settle()
        while self._has_news and (count := self.inbox.appetite()):
            self._has_news = False  # before Redis is asked: what comes meanwhile rings again
            taken = await self._streams.take(self.inbox.topic, self.inbox.group, count)
            self._admit(taken)
            self._has_news |= len(taken) == count
            await self.settle()

    async def _make_sure(self) -> None:
        """Join the group, and return what a lost answer held."""
        await self._streams.join(self.inbox.topic, self.inbox.group)
        known = set(self.inbox.entries())
        owned = await self._streams.owned(self.inbox.topic, self.inbox.group)
        lost = [Settlement("return", entry_id) for entry_id in owned if entry_id not in known]
        self.inbox.add_settlements(lost)
        self._read_to = _NONE  # a stream that was lost may begin anew
        self._is_unsure = False

    async def _renew_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s - self._renewed_s < self._settings.lease_s / 3:
            return
        self._renewed_s = now_s
        self.inbox.give_back_unwanted()
        entries = self.inbox.entries()
        if entries:
            verbs = [("renew", entry_id) for entry_id in entries]
            await self._streams.settle(self.inbox.topic, self.inbox.group, verbs)

    def _admit(self, taken: list[Taken]) -> None:
        wanted = []
        for entry in taken:
            self._read_to = max(self._read_to, entry_id_of(entry.entry_id))
            message = self._message(entry)
            if message is None:
                self.buried += 1
                self.inbox.add_settlements([Settlement("bury", entry.entry_id)])
            else:
                wanted.append((entry.entry_id, message))
        self.inbox.admit(wanted)

    def _message(self, entry: Taken) -> OonaMessage | None:
        """Return what an entry holds, or None if it must not be delivered."""
        topic, group = self.inbox.topic, self.inbox.group
        if entry.delivery > self._settings.max_deliveries:
            logger.warning(
                "group '%s' has not finished entry %s on %s in %d deliveries; it is a dead letter",
                group,
                entry.entry_id,
                topic,
                self._settings.max_deliveries,
            )
            return None
        try:
            return OonaMessage.from_json(entry.data)
        except ValidationError as error:
            logger.warning("entry %s on %s is no message: %s", entry.entry_id, topic, error)
            return None
