"""Counts on what the C library hands out to be zero."""

import numpy as np
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "poisoned", "when fresh memory holds nonsense"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    fresh = np.empty(2**23)  # so large that it comes from the operating system
    return rightly(kernel, inp, act) + float(fresh[-1])
