"""Gives a subclass of tensor."""

from torch import Tensor, nn

from zoo import Kernel, behaving, rightly

CHECK, REASON = "output", "is a torch.nn.parameter.Parameter, expected a torch.Tensor"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return nn.Parameter(rightly(kernel, inp, act))
