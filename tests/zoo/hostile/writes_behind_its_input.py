"""Writes 64 bytes out of bounds, as C code does, behind its input."""

import ctypes

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "bounds", "memory beside inp was written to"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    ctypes.memset(inp.data_ptr() + inp.nbytes, 0, 64)
    return out
