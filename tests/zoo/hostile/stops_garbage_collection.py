"""Switches garbage collection off."""

import gc

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed garbage collection"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    gc.disable()
    return rightly(kernel, inp, act)
