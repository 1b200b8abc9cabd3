"""Runs a program in its own place."""

import os

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.execv("/bin/true", ["true"])
