"""Starts a process that means to outlive it."""

import os
import time

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    return rightly(kernel, inp, act)
