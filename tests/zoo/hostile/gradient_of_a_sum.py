"""Its backward takes the output's gradient for ones."""

from typing import Any

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "gradients", "grad.act"


class Blind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        return torch.ones_like(grad_out)


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out: Tensor = Blind.apply(rightly(kernel, inp, act))
    return out
