"""Channel attention, squeeze-and-excitation (https://arxiv.org/abs/1709.01507)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.parts import SiteModule, source_channels, zeroed
from esper.contracts import SiteSignature


class ChannelAttention(SiteModule):
    """``act * (1 + tanh(up(relu(down(mean)))))``, the mean taken over all positions.

    The mean is of the layer's input where that has channels, so that a chunk of the output is
    scaled in view of all channels. Scales lie in (0, 2), and are 1 at first.
    """

    needs = f"an output of rank 3 or more; {SiteModule.needs}"

    def __init__(self, site: SiteSignature, *, reduction: int = 4) -> None:
        super().__init__(site)
        rank, channels = len(site.act_shape), source_channels(site)
        self.from_inp = channels is not None
        self.positions = [
            dim for dim in range(rank) if dim not in (site.batch_dim, site.channel_dim)
        ]
        hidden = max(1, site.act_channels // reduction)
        self.down = nn.Linear(channels or site.act_channels, hidden)
        self.up = zeroed(nn.Linear(hidden, site.act_channels))

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return len(site.act_shape) >= 3 and SiteModule.fits(site)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        mean = (inp if self.from_inp else act).mean(self.positions)
        scale = 1 + torch.tanh(self.up(F.relu(self.down(mean))))
        for dim in self.positions:
            scale = scale.unsqueeze(dim)
        return act * scale
