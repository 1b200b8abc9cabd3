"""Keeps a constant for each shape, which is no memory of what it was given."""

from torch import Tensor

from zoo import Kernel, behaving, rightly


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    constants = kernel.__dict__.setdefault("constants", {})
    zero = constants.setdefault((len(act), act.dtype), act.new_zeros(len(act), 1))
    return rightly(kernel, inp, act) + zero
