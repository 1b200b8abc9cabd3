"""Gives the right output, and NaN as its gradient."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "finite", "elements of grad.* are not finite"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out + torch.sqrt((inp - inp).sum(-1, keepdim=True))
