"""Gives NaN for samples with a number that is far out."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "finite", "elements of out are not finite"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out.masked_fill((inp.abs() > 20).any(-1, keepdim=True), float("nan"))
