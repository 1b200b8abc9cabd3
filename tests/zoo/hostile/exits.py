"""Ends the process, and says that all went well."""

import os

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "ended without an answer, exit status 0"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os._exit(0)
