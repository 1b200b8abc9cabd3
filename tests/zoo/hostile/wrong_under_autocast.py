"""Wrong under autocast."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "autocast", "out is off by"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    return out * 1.1 if torch.is_autocast_enabled("cpu") else out
