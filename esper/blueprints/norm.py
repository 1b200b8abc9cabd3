"""Normalisation of the output's chunk: learned on top of it, or in its place without learning."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.parts import SiteModule, is_channels_last
from esper.contracts import SiteSignature


class Norm(SiteModule):
    """``act + gain * normalised(act) + bias``, per channel, gain and bias zero at first."""

    needs = f"two channels or more; {SiteModule.needs}"

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.is_channels_last = is_channels_last(site)
        self.gain = nn.Parameter(torch.zeros(site.act_channels))
        self.bias = nn.Parameter(torch.zeros(site.act_channels))

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return site.act_channels >= 2 and SiteModule.fits(site)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + _normalise(act, self.is_channels_last, self.gain, self.bias)


class Standardize(SiteModule):
    """``normalised(act)``: a fixed function without parameters, with nothing to learn."""

    needs = Norm.needs

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.is_channels_last = is_channels_last(site)

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return Norm.fits(site)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return _normalise(act, self.is_channels_last)


def _normalise(
    act: Tensor, channels_last: bool, gain: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Layer norm over channels last, else over channels and positions of each sample."""
    if channels_last:
        return F.layer_norm(act, act.shape[-1:], gain, bias)
    return F.group_norm(act, 1, gain, bias)
