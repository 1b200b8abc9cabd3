"""Fails under autocast."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "autocast", "raised RuntimeError: not like this"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("not like this")
    return rightly(kernel, inp, act)
