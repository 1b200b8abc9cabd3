"""Changes in place what is its own."""

from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act).mul_(2).div_(2)
