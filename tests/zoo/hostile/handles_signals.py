"""Takes over SIGTERM."""

import signal

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed signal handlers"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return rightly(kernel, inp, act)
