"""Takes one message and works on it until it is killed: ``python oona_worker_child.py URL``."""

import asyncio
import sys

from esper.config import BusSettings
from esper.contracts import Topic
from esper.oona.redis import RedisBus


async def work(url: str) -> None:
    bus = RedisBus(url, BusSettings(lease_s=1.0, poll_s=0.05))
    messages = bus.subscribe(Topic.KERNEL_READY, "g")
    await anext(messages)
    print("working", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]))
