"""What the built-in designs share: fitting a site, and getting into and out of its channels."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from esper.contracts import SiteSignature
from esper.errors import BlueprintError
from esper.kasmina.example import is_transposed, takes_indices

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SiteModule(nn.Module):
    """Base of the built-in designs: ``forward(inp, act) -> out``, for the sites that fit."""

    needs: ClassVar[str] = "channels in the last dimension, or in the second of at most five"

    def __init__(self, site: SiteSignature) -> None:
        super().__init__()
        if not self.fits(site):
            raise BlueprintError(
                f"needs {self.needs}; got {site.host} with output {site.act_shape} "
                f"and channels in dimension {site.channel_dim}"
            )

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return is_channels_last(site) or is_spatial(site)


def is_channels_last(site: SiteSignature) -> bool:
    return site.channel_dim == len(site.act_shape) - 1


def is_spatial(site: SiteSignature) -> bool:
    """Tell whether ``act`` is (N, C, L), (N, C, H, W) or (N, C, D, H, W)."""
    return site.channel_dim == 1 and len(site.act_shape) - 2 in _CONVOLUTIONS


def convolution(site: SiteSignature) -> Callable[..., nn.Module]:
    """Return the convolution class of a spatial site's rank."""
    return _CONVOLUTIONS[len(site.act_shape) - 2]


def source_channels(site: SiteSignature) -> int | None:
    """Channels of ``inp`` where it can be mapped onto ``act``, else None.

    It can where the host is a convolution, whose geometry is known, and where ``inp`` and ``act``
    differ in their channels only. An embedding's indices and what a transposed convolution spreads
    out cannot.
    """
    if takes_indices(site) or is_transposed(site):
        return None
    if site.kernel_size:
        return site.inp_shape[1]
    if not site.shares_positions or len(site.inp_shape) != len(site.act_shape):
        return None
    return site.inp_shape[site.channel_dim]


def pointwise(
    site: SiteSignature, in_channels: int, out_channels: int, *, bias: bool = True
) -> nn.Module:
    """Return a linear map of the channels at each position."""
    if is_channels_last(site):
        return nn.Linear(in_channels, out_channels, bias=bias)
    return convolution(site)(in_channels, out_channels, 1, bias=bias)


class Down(nn.Module):
    """Project the layer's input to ``width`` channels at the positions of ``act``.

    At a convolution with the host's own geometry; where the input cannot be mapped onto ``act``,
    from ``act`` instead.
    """

    def __init__(self, site: SiteSignature, width: int, *, bias: bool = True) -> None:
        super().__init__()
        channels = source_channels(site)
        self.from_inp = channels is not None
        if channels is not None and site.kernel_size:
            self.project = convolution(site)(
                channels,
                width,
                site.kernel_size,
                stride=site.stride,
                padding=site.padding,
                dilation=site.dilation,
                bias=bias,
            )
        else:
            self.project = pointwise(site, channels or site.act_channels, width, bias=bias)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = self.project(inp if self.from_inp else act)
        return out


def zero_up(site: SiteSignature, width: int) -> nn.Module:
    """Return a map from ``width`` channels to those of ``act``, zero at first."""
    return zeroed(pointwise(site, width, site.act_channels))


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual design starts as the host alone."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
