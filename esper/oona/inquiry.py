"""Asks the controller at the other end of a bus: for its status, to pause, to go on."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from esper.contracts import OonaMessage, RequestKind, TamiyoRequest, TamiyoStatus, Topic
from esper.errors import BusError
from esper.oona.bus import Oona


class Inquiry:
    """Requests to the controller of one run, and its answers. Belongs to one event loop at a time.

    All of them share one consumer group, which goes with the loop: asking leaves nothing behind.
    """

    def __init__(self, bus: Oona, sender_id: str):
        self._bus = bus
        self._sender_id = sender_id
        self._group = f"{sender_id}-{uuid.uuid4().hex[:8]}"
        self._waiting: dict[str, asyncio.Future[TamiyoStatus]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, kind: RequestKind, timeout_s: float) -> TamiyoStatus:
        """Send a request and return its answer.

        Raises ``TimeoutError`` if none comes: a controller that is there later obeys all the same.
        Raises :class:`BusError` if the bus takes nothing any more.
        """
        if self._reading is None or self._reading.done():
            # Not before, since a group that nobody reads for keeps others waiting for it.
            answers = self._bus.subscribe(Topic.TAMIYO_STATUS, self._group)
            self._reading = asyncio.create_task(self._read(answers))
            self._reading.add_done_callback(self._leave)
        request = TamiyoRequest(kind=kind)
        answer: asyncio.Future[TamiyoStatus] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = answer
        try:
            self._bus.publish(Topic.TAMIYO_REQUESTS, self._sender_id, request)
            either: set[asyncio.Future[Any]] = {answer, self._reading}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._waiting[request.request_id]
        if answer.done():
            return answer.result()
        if self._reading.done():
            self._reading.result()
            raise BusError("the bus is closed")
        raise TimeoutError(f"no controller has answered in {timeout_s:g} s")

    async def _read(self, answers: AsyncGenerator[OonaMessage, None]) -> None:
        async for message in answers:
            status = message.payload
            assert isinstance(status, TamiyoStatus)
            answer = self._waiting.get(status.request_id or "")
            if answer is not None and not answer.done():
                answer.set_result(status)

    def _leave(self, _: asyncio.Task[None]) -> None:
        self._bus.forget(Topic.TAMIYO_STATUS, self._group)
