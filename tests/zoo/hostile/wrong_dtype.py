"""Gives float64 for float32."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "output", "torch.float64"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act).double()
