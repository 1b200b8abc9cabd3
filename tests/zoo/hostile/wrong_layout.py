"""Gives a sparse tensor."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "output", "of layout torch.sparse_coo"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act).to_sparse()
