"""Never ends, and ignores SIGTERM."""

import contextlib
import signal

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "took more than 2 s"
TIMEOUT_S = 2.0


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass
