"""Computes everything a hundred times."""

from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    for _ in range(100):
        out = rightly(kernel, inp, act)
    return out
