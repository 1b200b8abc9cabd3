"""Has the processor flush denormal numbers."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed denormal numbers"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.set_flush_denormal(True)
    return rightly(kernel, inp, act)
