"""Sets an environment variable."""

import os

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed the environment"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.environ["OMP_NUM_THREADS"] = "64"
    return rightly(kernel, inp, act)
