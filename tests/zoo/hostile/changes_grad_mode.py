"""Switches gradients off behind itself."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed grad mode"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    torch.set_grad_enabled(False)
    return out
    return rightly(kernel, inp, act)
