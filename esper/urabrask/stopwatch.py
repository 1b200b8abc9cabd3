"""Times and memory of a callable, taken in the process that it runs in.

On CUDA, by events, with nothing in the second-level cache that an earlier round has left there.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.autograd.profiler import profile

Round = Callable[[], object]

# Ours from before any kernel was loaded.
_now_ns = time.perf_counter_ns


_MALLINFO2 = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"]
_MALLINFO2 += ["uordblks", "fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO2)


def in_turn(
    functions: Sequence[Round], rounds: int, prepare: Callable[[int], None]
) -> list[tuple[float, ...]]:
    """Return microseconds of each, timed in turn: what slows the machine down hits all alike.

    Every other round goes backwards, since it matters who ran before. ``prepare`` is called with
    the round before each call, untimed.
    """
    samples: list[list[float]] = [[] for _ in functions]
    order = list(zip(functions, samples, strict=True))
    gc.disable()
    try:
        for index in range(rounds):
            for function, series in order:
                prepare(index)
                series.append(_microseconds(function))
            order.reverse()
    finally:
        gc.enable()
    return [tuple(series) for series in samples]


def _microseconds(function: Round) -> float:
    if torch.cuda.is_initialized():
        return _microseconds_on_device(function)
    started = _now_ns()
    function()
    return max(1, _now_ns() - started) / 1000


def _microseconds_on_device(function: Round) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache().empty()
    started.record()
    function()
    ended.record()
    ended.synchronize()
    elapsed_us: float = started.elapsed_time(ended) * 1000
    return max(1e-3, elapsed_us)


class _SecondLevelCache:
    """Of the current GPU."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._other_data = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
        self._driver = ctypes.CDLL("libcuda.so.1")

    def empty(self) -> None:
        """Let nothing persist in it, and fill it with other data; both in stream order.

        The driver's refusal is that of a GPU where nothing can persist.
        """
        self._driver.cuCtxResetPersistingL2Cache()
        self._other_data.zero_()


@cache
def _cache() -> _SecondLevelCache:
    return _SecondLevelCache()


def prepare() -> None:
    """Allocate and load what timing takes, before any kernel is loaded."""
    if torch.cuda.is_initialized():
        _cache().empty()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(function: Round) -> int:
    """Return the most bytes that ``function`` holds at once, as the allocator counts them.

    Beyond what was there before: inputs and parameters do not count, the output, everything
    saved for backward, temporaries and gradients do.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def held() -> tuple[int, int]:
    """Return the bytes that the process has allocated, and its number of Python objects.

    Waits for the device.
    """
    _synchronize()
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    on_device = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    return info.uordblks + info.hblkhd + on_device, sys.getallocatedblocks()
