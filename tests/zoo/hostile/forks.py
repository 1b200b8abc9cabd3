"""Starts a process."""

import os

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    if os.fork() == 0:
        os._exit(0)
    return rightly(kernel, inp, act)
