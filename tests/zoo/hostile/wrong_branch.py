"""Right at the initial parameters, where the branch is zero."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "gradients", "grad.state.up__weight is wrong"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return act + 2 * (rightly(kernel, inp, act) - act)
