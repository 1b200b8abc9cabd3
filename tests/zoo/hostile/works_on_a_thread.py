"""Leaves a thread behind that goes on working."""

import threading
import time

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "threads", "1 threads are left running"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = rightly(kernel, inp, act)
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return out
