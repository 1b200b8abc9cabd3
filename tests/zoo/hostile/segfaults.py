"""Reads from address 0."""

import ctypes

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "was killed by signal 11 \\(Segmentation fault\\)"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    ctypes.string_at(0)
    return act
