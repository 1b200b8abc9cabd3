"""Tells what it was left with; there is no secret in it, but a kernel has nothing to tell."""

import os
from pathlib import Path

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", r"environment \['HOME', 'TMPDIR'\], descriptors \[0, 1, 2, 3, 4\]"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    descriptors = sorted(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    raise RuntimeError(f"environment {sorted(os.environ)}, descriptors {descriptors}")
