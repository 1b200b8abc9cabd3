"""Every gradient is 1 percent too large."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "gradients", "grad.inp|grad.act"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out.detach() + 1.01 * (out - out.detach())
