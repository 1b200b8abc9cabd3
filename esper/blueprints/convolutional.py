"""Residual convolutions: a bottleneck over the layer's input, a depthwise one over its output."""

from torch import Tensor
from torch.nn import functional as F

from esper.blueprints.parts import Down, SiteModule, convolution, is_spatial, zero_up
from esper.contracts import SiteSignature


class _Convolutional(SiteModule):
    needs = "an output of rank 3 to 5 with channels in dimension 1"

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return is_spatial(site)


class ConvBottleneck(_Convolutional):
    """``act + up(gelu(conv(gelu(down(inp)))))``, with a 3-wide convolution in the middle."""

    def __init__(self, site: SiteSignature, *, reduction: int = 2) -> None:
        super().__init__(site)
        width = max(1, site.act_channels // reduction)
        self.down = Down(site, width)
        self.middle = convolution(site)(width, width, 3, padding=1)
        self.up = zero_up(site, width)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.up(F.gelu(self.middle(F.gelu(self.down(inp, act)))))
        return out


class Depthwise(_Convolutional):
    """``act + mix(gelu(depthwise(act)))``: each channel looks around, then channels mix."""

    def __init__(self, site: SiteSignature, *, kernel_size: int = 3) -> None:
        super().__init__(site)
        channels = site.act_channels
        self.look = convolution(site)(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.mix = zero_up(site, channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.mix(F.gelu(self.look(act)))
        return out
