"""Replaces what seals the answers."""

from functools import partial

from torch import Tensor

from esper.urabrask import wire
from zoo import Kernel, behaving, rightly

CHECK, REASON = "surroundings", "changed esper.urabrask.wire.seal"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    seal = wire.seal
    wire.seal = partial(seal)
    return rightly(kernel, inp, act)
