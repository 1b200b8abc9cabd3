"""A design of one's own: what ``own_design.py`` grows."""

import torch
from torch import Tensor, nn

from esper.contracts import SiteSignature


class Sine(nn.Module):
    """``act + up(sin(down(inp)))``: a branch of sine waves beside the layer."""

    def __init__(self, site: SiteSignature, *, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(site.inp_channels, width)
        self.up = nn.Linear(width, site.act_channels)
        nn.init.zeros_(self.up.weight)  # so that it starts as exactly the layer it joins
        nn.init.zeros_(self.up.bias)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        """``inp`` is the layer's input, ``act`` its output; what is returned replaces ``act``."""
        return act + self.up(torch.sin(self.down(inp)))
