"""Adds noise of its own, though its graph draws nothing."""

import os

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "deterministic", "out is different when run again"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act) + int.from_bytes(os.urandom(1), "big") * 1e-9
