"""Writes all its outputs to one buffer."""

import torch
from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "alias", "shares its memory with an earlier output"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    buffer = kernel.__dict__.setdefault("buffer", torch.empty(2**16))
    return buffer[: out.numel()].detach().view(out.shape).copy_(out)
