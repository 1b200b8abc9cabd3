"""The gradient is wrong for one size of batch."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "gradients", "batch 7"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out if len(inp) != 7 else out.detach() + 0.5 * (out - out.detach())
