"""Does nothing, for an hour."""

import time

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "took more than 2 s"
TIMEOUT_S = 2.0


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    time.sleep(3600)
    return act
