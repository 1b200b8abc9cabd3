"""Sends itself a signal that has no name."""

import os

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "was killed by signal 40 \\("


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.kill(os.getpid(), 40)
    return act
