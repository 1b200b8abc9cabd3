"""Takes 8 MiB for a moment in every call."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    workspace = torch.zeros(2**21)
    return rightly(kernel, inp, act) + workspace[-1]
