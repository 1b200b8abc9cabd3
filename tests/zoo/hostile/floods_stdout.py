"""Prints without end."""

import os

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "printed more than 65536 bytes"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    while True:
        os.write(1, b"x" * 4096)
