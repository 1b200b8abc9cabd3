"""Residual MLP: the layer's input through one hidden layer, added to the output."""

from torch import Tensor
from torch.nn import functional as F

from esper.blueprints.parts import Down, SiteModule, zero_up
from esper.contracts import SiteSignature


class ResidualMLP(SiteModule):
    """``act + up(gelu(down(inp)))``, with ``expansion`` hidden channels per channel of ``act``."""

    def __init__(self, site: SiteSignature, *, expansion: float = 2.0) -> None:
        super().__init__(site)
        hidden = max(1, round(expansion * site.act_channels))
        self.down = Down(site, hidden)
        self.up = zero_up(site, hidden)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.up(F.gelu(self.down(inp, act)))
        return out
