"""What a thread's wall time went into, by Linux: computing, waiting for a core, or being blocked.

Other processes on the machine make a thread wait for a core, which says nothing of its own work.

The run queue's clock is read without letting go of the interpreter's lock. A file object's
``read`` does let go of it, so that any thread that wanted it ran between the clocks: its time, up to
a switch interval, counted as the caller's wait for a core and hid as much of what blocked it.

What a hypervisor takes of a core is in none of Linux's clocks, and so seems to block a thread.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.clocks import Work

_BYTES = 128  # more than three numbers take


@dataclass(frozen=True)
class Spent:
    """Nanoseconds of one call."""

    wall_ns: int
    ran_ns: int
    queued_ns: int

    @property
    def own_ns(self) -> int:
        """Wall time but for the wait for a core: what it would take on a machine of its own."""
        return max(0, self.wall_ns - self.queued_ns)

    @property
    def blocked_ns(self) -> int:
        return max(0, self.own_ns - self.ran_ns)


def each(work: Work, count: int) -> list[Spent]:
    """Call ``work`` so often in the calling thread, and return what each call took."""
    spent = []
    with _queue_clock() as queued_ns:
        for _ in range(count):
            start, queued, ran = time.perf_counter_ns(), queued_ns(), time.thread_time_ns()
            work()
            ran, queued = time.thread_time_ns() - ran, queued_ns() - queued
            spent.append(Spent(time.perf_counter_ns() - start, ran, queued))
    return spent


@contextlib.contextmanager
def _queue_clock() -> Iterator[Callable[[], int]]:
    """Yield what tells how long the calling thread has waited for a core, in nanoseconds."""
    pread = ctypes.PyDLL(None).pread  # of PyDLL, as only CDLL lets go of the lock
    buffer = ctypes.create_string_buffer(_BYTES)
    file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)

    def queued_ns() -> int:
        length = pread(file, buffer, _BYTES, 0)
        return int(buffer.raw[:length].split()[1])

    try:
        yield queued_ns
    finally:
        os.close(file)
