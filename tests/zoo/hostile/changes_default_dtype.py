"""Sets the default dtype."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed the default dtype"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return rightly(kernel, inp, act)
