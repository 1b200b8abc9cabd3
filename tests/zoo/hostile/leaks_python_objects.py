"""Writes a diary of its calls."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "memory", "python_blocks grow by"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    kernel.__dict__.setdefault("diary", []).append([len(inp), object()])
    return rightly(kernel, inp, act)
