"""Leaves a file in the folder for temporary ones."""

from pathlib import Path

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "runs", "Permission denied"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    Path("/tmp/trace").write_bytes(b"x")
    return rightly(kernel, inp, act)
