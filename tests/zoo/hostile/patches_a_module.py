"""Replaces what all modules do when they are called."""

from torch import Tensor, nn

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed torch.nn.Module.__call__"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    nn.Module.__call__ = lambda self, *args: self.forward(*args)
    return rightly(kernel, inp, act)
