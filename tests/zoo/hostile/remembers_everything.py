"""Keeps every output that it has ever given."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "memory", "grow by"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    kernel.__dict__.setdefault("outputs", []).append(out.detach())
    return out
