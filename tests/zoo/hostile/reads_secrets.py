"""Looks for keys."""

from pathlib import Path

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "Permission denied"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    raise RuntimeError(Path("/etc/shadow").read_text())
