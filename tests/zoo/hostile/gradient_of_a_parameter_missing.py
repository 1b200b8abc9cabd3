"""One parameter has no gradient."""

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "gradients", "grad.state.up__bias is missing"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    *others, last = kernel.weights()
    return kernel.call(inp, act, (*others, last.detach()))
