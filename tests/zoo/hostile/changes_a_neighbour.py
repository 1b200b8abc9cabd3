"""Writes to the channels of the layer's output that belong to another seed."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "unmodified", "act was modified by the call"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    wide = act.detach().as_strided((len(act), act.stride(0)), act.stride())
    wide[:, -1] = 0
    return out
