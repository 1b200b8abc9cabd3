"""Stands in for the forge's child process, where a test is not about processes."""

import asyncio
from collections.abc import Mapping

from esper.tezzeret import child
from esper.worker import Blobs, Header


class InlineWorker:
    """Answers as the child process does, in this one; ``gate`` holds back every call."""

    def __init__(self, module: str, *, niceness: int, memory_limit_bytes: int) -> None:
        assert module == "esper.tezzeret.child"
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        self.closed = False

    async def call(
        self, method: str, header: Header, blobs: Mapping[str, bytes], *, timeout_s: float
    ) -> tuple[Header, Blobs]:
        self.called.set()
        await self.gate.wait()
        return child.HANDLERS[method](header, dict(blobs))

    async def close(self) -> None:
        self.closed = True

    def cpu_time_s(self) -> float:
        return 0.0
