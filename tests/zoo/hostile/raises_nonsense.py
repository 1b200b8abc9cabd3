"""Raises an error that is no text."""

from torch import Tensor

from zoo import Kernel, behaving

CHECK, REASON = "runs", "raised RuntimeError: \\\\ud800x"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    raise RuntimeError("\ud800" + 10_000 * "x")
