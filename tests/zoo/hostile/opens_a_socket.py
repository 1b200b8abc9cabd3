"""Calls home."""

import contextlib
import socket

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "confined", "made a system call that the sandbox forbids"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    return rightly(kernel, inp, act)
