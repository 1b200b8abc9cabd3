"""Doubles act in place."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "unmodified", "act was modified by the call"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    act.detach().mul_(2)
    return out
