"""Prints a line in every call of the first fifty."""

from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    calls = kernel.__dict__["calls"] = kernel.__dict__.get("calls", 0) + 1
    if calls <= 50:
        print("call", calls)
    return rightly(kernel, inp, act)
