"""Low-rank update of the host's own map, as LoRA has it (https://arxiv.org/abs/2106.09685)."""

from torch import Tensor

from esper.blueprints.parts import Down, SiteModule, zero_up
from esper.contracts import SiteSignature


class LowRank(SiteModule):
    """``act + up(down(inp))``: linear, so it can be folded into a linear host."""

    def __init__(self, site: SiteSignature, *, rank: int = 8) -> None:
        super().__init__(site)
        self.down = Down(site, rank, bias=False)
        self.up = zero_up(site, rank)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.up(self.down(inp, act))
        return out
