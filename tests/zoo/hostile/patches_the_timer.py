"""Replaces the clock that it is timed with."""

import time

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed time.perf_counter_ns"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    time.perf_counter_ns = lambda: 0
    return rightly(kernel, inp, act)
