"""Attaches itself to the process that it was forked from, as a debugger does."""

import ctypes
import os

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
    return rightly(kernel, inp, act)
