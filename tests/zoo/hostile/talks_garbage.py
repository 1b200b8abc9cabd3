"""Writes nonsense to where answers are expected."""

import os

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "runs", "sent a frame with a header of"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.write(3, b"\xff" * 64)
    return rightly(kernel, inp, act)
