"""Counts on fresh memory to be zero."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "poisoned", "when fresh memory holds nonsense"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    fresh = torch.empty(2**22)  # so large that it comes from the operating system
    return rightly(kernel, inp, act) + fresh[-1]
