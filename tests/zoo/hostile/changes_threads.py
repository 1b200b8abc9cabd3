"""Sets the number of threads."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed the number of threads"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.set_num_threads(2)
    return rightly(kernel, inp, act)
