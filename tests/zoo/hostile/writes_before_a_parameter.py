"""Writes 8 bytes out of bounds, as C code does, before a parameter."""

import ctypes

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "bounds", "memory beside down__weight was written to"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    ctypes.memset(kernel.weights()[0].data_ptr() - 8, 0, 8)
    return out
