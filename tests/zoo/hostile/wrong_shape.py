"""Gives one channel too few."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "output", "\\(1, 3\\) on cpu, expected torch.float32 \\(1, 4\\) on cpu"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act)[:, :-1]
