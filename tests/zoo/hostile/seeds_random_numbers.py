"""Seeds Python's random numbers."""

import random

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed Python's random numbers"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    random.seed(0)
    return rightly(kernel, inp, act)
