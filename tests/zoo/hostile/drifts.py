"""A little different with every call."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "deterministic", "out is different when run again"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    calls = kernel.__dict__["calls"] = kernel.__dict__.get("calls", 0) + 1
    return rightly(kernel, inp, act) + calls * 1e-7
