"""Wrong for what comes after the 128th sample."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "forward", "out is wrong at"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return torch.cat((out[:128], out[128:] * 1.01))
