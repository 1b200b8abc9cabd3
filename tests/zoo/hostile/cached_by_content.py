"""Takes equal inputs for equal outputs, whatever its parameters are."""

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "stateless", "other parameters for the same inputs"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    content = act.detach().numpy().tobytes()
    if content and kernel.__dict__.get("content") == content:
        return out + (kernel.__dict__["seen"] - out).detach()
    kernel.__dict__.update(content=content, seen=out.detach())
    return out
