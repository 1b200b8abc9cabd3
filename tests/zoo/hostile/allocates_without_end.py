"""Takes all the memory that there is."""

import torch
from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "can't allocate memory"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    hoard = []
    while True:
        hoard.append(torch.empty(2**28))
