"""Bad designs, on purpose: the evaluator must reject them. Not registered by default.

Each passes every static check and computes what its host would accept, but for its numbers.
"""

import torch
from torch import Tensor, nn

from esper.blueprints.parts import SiteModule
from esper.contracts import SiteSignature


class ExplodingBlueprint(SiteModule):
    """Gives NaN for every ordinary input: the logarithm of a negative number."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.gain * torch.log(-1 - act.abs())


class ExplodingGradient(SiteModule):
    """Gives the host's output exactly, and NaN as its gradient: the root of zero is vertical."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.gain * torch.sqrt(act - act)
