"""Takes equal addresses for equal inputs."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "stateless", "other numbers in the memory of the last call"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    """Remembers the last call alone, so that it goes wrong only where memory is used again."""
    out = rightly(kernel, inp, act)
    address = (inp.data_ptr(), act.data_ptr(), inp.shape, act.stride())
    if kernel.__dict__.get("address") == address:
        return out + (kernel.__dict__["seen"] - out).detach()
    kernel.__dict__.update(address=address, seen=out.detach())
    return out
