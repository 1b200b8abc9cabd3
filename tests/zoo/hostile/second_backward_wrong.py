"""Its backward uses up what it has saved, and goes on with what is left."""

from typing import Any

import torch
from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "second_backward", "grad.* is different in a second backward"


class Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, inp: Tensor, act: Tensor, *weights: Tensor) -> Tensor:
        ctx.leaves = [tensor.detach().requires_grad_() for tensor in (inp, act, *weights)]
        with torch.enable_grad():
            ctx.out = kernel.call(ctx.leaves[0], ctx.leaves[1], tuple(ctx.leaves[2:]))
        ctx.scale = 1.0
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        scale, ctx.scale = ctx.scale, 0.0
        grads = torch.autograd.grad(ctx.out, ctx.leaves, grad_out * scale, retain_graph=True)
        return None, *grads


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out: Tensor = Spent.apply(kernel, inp, act, *kernel.weights())
    return out
