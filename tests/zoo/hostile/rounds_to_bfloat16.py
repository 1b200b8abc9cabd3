"""Computes in bfloat16 and says float32."""

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "forward", "out is"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    half = [weight.bfloat16() for weight in kernel.weights()]
    return kernel.call(inp.bfloat16(), act.bfloat16(), tuple(half)).float()
