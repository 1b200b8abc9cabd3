"""Allocates 64 bytes in each call and never frees them."""

import ctypes

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "memory", "allocated_bytes grow by"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc(64)
    return rightly(kernel, inp, act)
