"""Gated residual branch, SwiGLU (https://arxiv.org/abs/2002.05202, equation 6)."""

from torch import Tensor
from torch.nn import functional as F

from esper.blueprints.parts import Down, SiteModule, zero_up
from esper.contracts import SiteSignature


class Gated(SiteModule):
    """``act + up(silu(gate(inp)) * value(inp))``, both projections in one."""

    def __init__(self, site: SiteSignature, *, expansion: float = 1.0) -> None:
        super().__init__(site)
        hidden = max(1, round(expansion * site.act_channels))
        self.channel_dim = site.channel_dim
        self.down = Down(site, 2 * hidden)
        self.up = zero_up(site, hidden)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        gate, value = self.down(inp, act).chunk(2, dim=self.channel_dim)
        out: Tensor = act + self.up(F.silu(gate) * value)
        return out
