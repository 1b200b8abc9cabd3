"""Kills the process that it was forked from."""

import os
import signal

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.kill(os.getppid(), signal.SIGKILL)
    return rightly(kernel, inp, act)
