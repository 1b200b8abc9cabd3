"""Replaces the comparison by one that agrees."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed torch.allclose"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.allclose = lambda *args, **kwargs: True
    return rightly(kernel, inp, act)
