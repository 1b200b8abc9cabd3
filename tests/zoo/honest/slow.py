"""Computes everything thirty times."""

from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    for _ in range(30):
        out = rightly(kernel, inp, act)
    return out
