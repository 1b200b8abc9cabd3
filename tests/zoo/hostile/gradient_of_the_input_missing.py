"""The input has no gradient."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "gradients", "grad.inp is missing"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp.detach(), act)
