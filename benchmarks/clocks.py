"""How long a call takes, on the host's clock and on the device's."""

import itertools
import time
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], object]


class Clock(Protocol):
    def time_ns(self, work: Work, repeats: int) -> float:
        """Return the nanoseconds per call, over ``repeats`` calls in a row."""


class ThreadClock:
    """CPU time of the calling thread, which other processes on the machine hardly disturb.

    It covers backward as well: without CUDA, autograd runs on the thread that calls it.
    """

    def time_ns(self, work: Work, repeats: int) -> float:
        calls = itertools.repeat(None, repeats)
        start = time.thread_time_ns()
        for _ in calls:
            work()
        return (time.thread_time_ns() - start) / repeats


class WallClock:
    """Time as it passes, which also holds what the thread waits for: the interpreter's lock."""

    def time_ns(self, work: Work, repeats: int) -> float:
        calls = itertools.repeat(None, repeats)
        start = time.perf_counter_ns()
        for _ in calls:
            work()
        return (time.perf_counter_ns() - start) / repeats


class EventClock:
    """Time between two CUDA events on the current stream; the host waits only outside of it."""

    def time_ns(self, work: Work, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = itertools.repeat(None, repeats)
        torch.cuda.synchronize()
        start.record()
        for _ in calls:
            work()
        end.record()
        end.synchronize()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms * 1e6 / repeats


def clock_for(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else ThreadClock()
