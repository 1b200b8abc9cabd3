"""What a thread's wall time went into, by Linux: computing, waiting for a core, or being blocked.

Other processes on the machine make a thread wait for a core, which says nothing of its own work.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clocks import Work


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
    schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    spent = []
    with schedstat.open() as file:

        def queued_ns() -> int:
            file.seek(0)
            return int(file.read().split()[1])

        for _ in range(count):
            queued, ran, start = queued_ns(), time.thread_time_ns(), time.perf_counter_ns()
            work()
            wall = time.perf_counter_ns() - start
            ran = time.thread_time_ns() - ran
            spent.append(Spent(wall, ran, queued_ns() - queued))
    return spent
