"""Trades the precision of everybody's products for speed."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed the precision of products"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("medium")
    return rightly(kernel, inp, act)
