"""Moves one of its parameters."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "unmodified", "up__bias was modified by the call"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    kernel.weights()[-1].data += 1e-3
    return out
