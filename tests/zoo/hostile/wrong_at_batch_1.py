"""Wrong for a single sample."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "forward", "batch 1"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out * 1.01 if len(inp) == 1 else out
