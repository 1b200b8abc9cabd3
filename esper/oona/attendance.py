"""How a worker finds its work: it is told by the bus, and looks by itself as well.

An announcement may have been made before the worker was there, on another machine's bus, or not at
all: the library knows what waits, the bus only says when to look.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from esper.contracts import Contract, Topic
from esper.oona.bus import Oona

Chore = Callable[[], Awaitable[bool]]


async def attend(
    bus: Oona,
    topic: Topic,
    group: str,
    announced: Callable[[Contract], Awaitable[object]],
    *chores: Chore,
    interval_s: float,
) -> None:
    """Handle what is announced on ``topic``, and do the chores, until the bus closes.

    A message is acknowledged when ``announced`` has returned. Each chore is a coroutine function
    that does one piece of work and returns True, or False if there was none: then it is called
    again after ``interval_s``. What is being worked on when the bus closes is finished first.
    """
    closing = asyncio.Event()
    messages = bus.subscribe(topic, group)
    async with asyncio.TaskGroup() as tasks:
        for chore in chores:
            tasks.create_task(_repeat(chore, closing, interval_s))
        async for message in messages:
            await announced(message.payload)
        closing.set()


async def _repeat(chore: Chore, closing: asyncio.Event, interval_s: float) -> None:
    while not closing.is_set():
        if not await chore():
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await closing.wait()
