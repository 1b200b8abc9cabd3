"""Sends what was published, and looks after the streams; when Redis is away, keeps and logs it."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from redis.exceptions import RedisError

from esper.config import BusSettings
from esper.contracts import Topic
from esper.oona.bus import TELEMETRY
from esper.oona.changes import Signal
from esper.oona.outbox import Letter, Outbox
from esper.oona.spool import Spool
from esper.oona.streams import StreamReport, Streams

logger = logging.getLogger(__name__)

UNREACHABLE = (RedisError, OSError)
FIRST_PAUSE_S = 0.02  # before trying again; twice as long each time, up to poll_s

_CONTROL = [topic for topic in Topic if topic not in TELEMETRY]
_BATCH_MESSAGES = 256
_BATCH_BYTES = 4 * 2**20
_MIN_TELEMETRY = 16  # messages of a topic in Redis, however large


@dataclass(eq=False)
class _Outage:
    began_s: float
    pause_s: float = FIRST_PAUSE_S
    telemetry_dropped: int = 0


class Courier:
    """The one task that sends, so that every topic keeps its order. Belongs to one event loop.

    ``place`` is what Redis is called in log lines. ``on_sending`` is called when something goes to a
    topic, ``on_sent`` when Redis has it. ``is_taking`` says whether what is to be received can be:
    an outage lasts until it is so.
    """

    def __init__(
        self,
        streams: Streams,
        outbox: Outbox,
        spool: Spool,
        settings: BusSettings,
        *,
        mail: Signal,
        place: str,
        on_sending: Callable[[Topic], None],
        on_sent: Callable[[], None],
        is_taking: Callable[[], bool],
    ):
        self._streams = streams
        self._outbox = outbox
        self._spool = spool
        self._settings = settings
        self._mail = mail
        self._place = place
        self._on_sending = on_sending
        self._on_sent = on_sent
        self._is_taking = is_taking
        self._outage: _Outage | None = None
        self._surveyed_s = 0.0
        self._order = asyncio.Lock()  # nothing is half sent while a survey is made

    async def run(self, note_reports: Callable[[dict[Topic, StreamReport]], None]) -> None:
        """Send what comes for as long as the task lives; hand over what surveys find."""
        while True:
            await self._wait()
            try:
                await self.deliver()
                if self._is_survey_due():
                    note_reports(await self.survey())
                self._end_outage()
            except UNREACHABLE as error:
                self.note_trouble(error)

    async def deliver(self) -> None:
        """Send all that waits, control first. Raises what Redis raises."""
        async with self._order:
            for topic in _CONTROL:
                await self._deliver_control(topic)
            for topic in TELEMETRY:
                await self._deliver_telemetry(topic)

    async def survey(self) -> dict[Topic, StreamReport]:
        """Look at all streams at one instant; let go of what is acknowledged, resend what is lost."""
        async with self._order:
            self._surveyed_s = time.monotonic()
            reports = await self._streams.survey(
                {topic: self._outbox.span(topic) for topic in Topic},
                dict.fromkeys(_CONTROL, self._settings.capacity),
                forget_ms=round(1e3 * self._settings.forget_group_s),
            )
            for topic, report in reports.items():
                if report.is_broken:
                    self._send_again(topic)
                else:
                    self._outbox.note_groups(topic, report.groups)
            return reports

    def note_trouble(self, error: Exception) -> None:
        """Begin or prolong an outage: what cannot be sent now goes to the local log."""
        if self._outage is None:
            reason = str(error) or type(error).__name__
            self._outage = _Outage(time.monotonic())
            self._outbox.outage = f"Redis at {self._place} does not take them ({reason})"
            logger.warning(
                "Redis at %s does not answer as it should (%s). Training goes on; control messages "
                "are kept, and everything is logged to %s",
                self._place,
                reason,
                self._spool.path,
            )
        for topic in TELEMETRY:
            while letters := self._outbox.unsent(topic, _BATCH_MESSAGES):
                self._give_up(topic, letters)
        self._spool.write(self._outbox.unlogged())
        self._mail.set()

    async def _wait(self) -> None:
        if self._outage is None:
            await self._mail.wait(self._settings.poll_s)
        else:
            await asyncio.sleep(self._outage.pause_s)
            self._outage.pause_s = min(2 * self._outage.pause_s, self._settings.poll_s)

    def _end_outage(self) -> None:
        if self._outage is None or not self._is_taking():
            return
        logger.warning(
            "Redis at %s is back after %.1f s; %d telemetry messages were dropped, no control "
            "message was",
            self._place,
            time.monotonic() - self._outage.began_s,
            self._outage.telemetry_dropped,
        )
        self._outage = None
        self._outbox.outage = None

    def _is_survey_due(self) -> bool:
        age_s = time.monotonic() - self._surveyed_s
        return (
            self._outage is not None
            or age_s >= self._settings.poll_s
            or self._outbox.is_half_full()
        )

    async def _deliver_control(self, topic: Topic) -> None:
        while letters := self._outbox.unsent(topic, _BATCH_MESSAGES):
            for batch, messages in _batches(letters):
                self._on_sending(topic)
                entry_ids = await self._streams.append(topic, messages, self._outbox.span(topic))
                if entry_ids is None:
                    self._send_again(topic)
                    break
                self._outbox.note_sent(topic, batch, entry_ids)
                self._on_sent()

    async def _deliver_telemetry(self, topic: Topic) -> None:
        while letters := self._outbox.unsent(topic, _BATCH_MESSAGES):
            try:
                for batch, messages in _batches(letters):
                    self._on_sending(topic)
                    await self._streams.append(topic, messages, trim_to=self._trim_to(messages))
                    del letters[: len(batch)]
            except UNREACHABLE:
                self._give_up(topic, letters)
                raise

    def _trim_to(self, messages: list[tuple[str, bytes]]) -> int:
        largest_bytes = max(len(data) for _, data in messages)
        affordable = self._settings.telemetry_limit_bytes // largest_bytes
        return min(self._settings.telemetry_capacity, max(_MIN_TELEMETRY, affordable))

    def _give_up(self, topic: Topic, letters: list[Letter]) -> None:
        """Telemetry is worth nothing when it is late: to the log, and counted."""
        self._spool.write(letter.message for letter in letters)
        self._outbox.note_dropped(topic, len(letters))
        if self._outage is not None:
            self._outage.telemetry_dropped += len(letters)

    def _send_again(self, topic: Topic) -> None:
        count = self._outbox.send_again(topic)
        logger.warning(
            "Redis at %s has lost data; %d messages on %s are sent again", self._place, count, topic
        )
        self._mail.set()


def _batches(letters: list[Letter]) -> Iterator[tuple[list[Letter], list[tuple[str, bytes]]]]:
    """Encode letters, and divide them where a batch would become too large."""
    batch: list[Letter] = []
    messages: list[tuple[str, bytes]] = []
    size = 0
    for letter in list(letters):
        data = letter.message.to_json()
        if batch and size + len(data) > _BATCH_BYTES:
            yield batch, messages
            batch, messages, size = [], [], 0
        batch.append(letter)
        messages.append((letter.message.event_id, data))
        size += len(data)
    if batch:
        yield batch, messages
