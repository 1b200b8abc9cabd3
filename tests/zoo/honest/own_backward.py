"""One autograd function with a backward of its own, as compiled kernels have; refuses a second."""

from typing import Any

import torch
from torch import Tensor

from zoo import Kernel, behaving


class Glued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, inp: Tensor, act: Tensor, *weights: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(inp, act, *weights)
        return kernel.call(inp, act, weights).detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.kernel.call(leaves[0], leaves[1], tuple(leaves[2:]))
        return None, *torch.autograd.grad(out, leaves, grad_out)


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out: Tensor = Glued.apply(kernel, inp, act, *kernel.weights())
    return out
