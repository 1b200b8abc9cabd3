"""One element of the output is off by 1e-4."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "forward", "out is wrong at 1 of 4 elements, by up to 1.00e-04"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    nudge = torch.zeros_like(act)
    nudge[-1:, -1] = 1e-4
    return rightly(kernel, inp, act) + nudge
