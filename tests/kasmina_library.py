"""Designs that behave in ways tests need, and a fake library that makes kernels of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import esper.testing
from esper.contracts import KernelStatus, SiteSignature
from esper.testing import LINEAR_8_4


class Residual(nn.Module):
    """``act + up(tanh(down(inp)))`` with a branch that is not zero at the start: a bottleneck."""

    def __init__(self, site: SiteSignature, dropout: float = 0.0):
        super().__init__()
        self.down = nn.Linear(site.inp_channels, 3)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.up = nn.Linear(3, site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.up(self.dropout(torch.tanh(self.down(inp))))


class Irregular(Residual):
    """The same function, but none that can be computed in one go."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) * 1


class NotANumber(Residual):
    """NaN in the first channel of every row, whatever comes in."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out = super().forward(inp, act)
        first, rest = out[:, :1], out[:, 1:]
        return torch.cat([torch.sqrt(-1 - first * first), rest], 1)


class InfiniteGradient(Residual):
    """Finite outputs, but the square root's slope at 0 makes the gradients non-finite."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out = super().forward(inp, act)
        return act + torch.sqrt((out - act) * 0)


class Root(Residual):
    """NaN for every row whose first input is negative."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) + 0 * torch.sqrt(inp[:, :1])


class Tracking(Residual):
    """Keeps running statistics of its branch, like the host's batch norms."""

    def __init__(self, site: SiteSignature):
        super().__init__(site)
        self.norm = nn.BatchNorm1d(site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.norm(super().forward(inp, act) - act)


class OneBatchOnly(Residual):
    """Fails for all but a batch of 5, by adding a parameter with five rows."""

    def __init__(self, site: SiteSignature):
        super().__init__(site)
        self.rows = nn.Parameter(torch.ones(1, site.act_channels))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) * self.rows


class Doubled(nn.Module):
    """A fixed function: no parameters, nothing to train."""

    def __init__(self, site: SiteSignature):
        super().__init__()

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act * 2


class MemoryLibrary(esper.testing.FakeLibrary):
    """A fake library that makes :class:`Residual` unless told otherwise."""

    def add(
        self,
        builder: Callable[..., nn.Module] = Residual,
        site: SiteSignature = LINEAR_8_4,
        *,
        status: KernelStatus = KernelStatus.VALIDATED,
        device: str = "cpu",
        **hparams: float,
    ) -> str:
        return super().add(builder, site, status=status, device=device, **hparams)
