"""Leaves a file in its scratch folder."""

from pathlib import Path

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "runs", "File too large"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    Path("trace").write_bytes(b"x")
    return rightly(kernel, inp, act)
