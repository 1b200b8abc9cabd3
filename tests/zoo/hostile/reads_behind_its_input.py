"""Uses what lies behind its input in memory."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "finite", "elements of .* are not finite"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    behind = inp.detach().as_strided((1,), (1,), inp.storage_offset() + inp.numel())
    return rightly(kernel, inp, act) + 0 * behind
