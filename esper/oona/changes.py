"""Wakes coroutines, on whatever event loops they run, from any thread."""

import asyncio
import contextlib
import threading


class Changes:
    """Something that coroutines of any loop watch and any thread announces.

    ``with changes.watch() as changed``: look first, then ``await changed.wait()``; whatever is
    announced after the ``with`` was entered wakes it.
    """

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._lock = threading.Lock()

    def watch(self) -> "Watcher":
        return Watcher(self)

    def announce(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.wake()

    def add(self, watcher: "Watcher") -> None:
        with self._lock:
            self._watchers.add(watcher)

    def discard(self, watcher: "Watcher") -> None:
        with self._lock:
            self._watchers.discard(watcher)


class Watcher:
    """An event of the running loop, set by what is announced while the ``with`` block runs."""

    def __init__(self, changes: Changes):
        self._changes = changes
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed, so nobody waits there
            self._loop.call_soon_threadsafe(self._event.set)

    def __enter__(self) -> asyncio.Event:
        self._changes.add(self)
        return self._event

    def __exit__(self, *_: object) -> None:
        self._changes.discard(self)


class Signal:
    """An event for one loop that any thread may set; setting it again costs next to nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._event = asyncio.Event()
        self._is_set = False

    def set(self) -> None:
        if self._is_set:
            return
        self._is_set = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> bool:
        """Return whether it was set within ``timeout_s``, and clear it. On its loop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        was_set = self._event.is_set()
        # In this order: a thread that finds it set has left its work before we look for it.
        self._is_set = False
        self._event.clear()
        return was_set
