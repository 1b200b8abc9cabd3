"""Its output is its input."""

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "alias", "shares its memory with act"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return act.view_as(act)
