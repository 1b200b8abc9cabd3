"""Draws from the stream that the training draws from."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed torch's random numbers"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.rand(1)
    return rightly(kernel, inp, act)
