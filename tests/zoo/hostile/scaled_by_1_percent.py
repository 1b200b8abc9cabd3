"""Its output is 1 percent too large."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "forward", "out is wrong at . of 4 elements"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act) * 1.01
