"""What a site is: a host layer that carries seeds, and what a kernel there has to look like.

A site is a host module whose output, or the first element of it, is a floating-point tensor. Its
channels are divided among the seeds in contiguous chunks. Shapes that the module itself does not
tell (the rank of a Linear's input, the width of an activation) are learned from the first forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.contracts import SiteSignature

ChannelDim = Callable[[int], int]  # rank of the output -> channel dimension, non-negative
Shape = tuple[int | None, ...]
Geometry = Mapping[str, tuple[int, ...]]  # the convolution fields of a SiteSignature


@dataclass(frozen=True)
class SiteType:
    """How to read one module: where its channels are, and what it tells before a forward.

    ``host`` names the class whose forward runs, which for lazy, parametrized and derived modules is
    not the class of the module. ``declared`` holds the shapes of input and output as far as the
    module's attributes tell them. ``shares_positions``: output and input differ in their channels
    only, so that a kernel can map one onto the other.
    """

    host: str
    channel_dim: ChannelDim
    by_default: bool = True
    declared: tuple[Shape, Shape] | None = None
    geometry: Geometry = field(default_factory=dict)
    batch_dim: int = 0
    shares_positions: bool = True


def chunk_bounds(channels: int, num_seeds: int) -> list[tuple[int, int]]:
    """Divide ``channels`` into ``num_seeds`` contiguous ``(start, length)`` as evenly as possible.

    The first ``channels % num_seeds`` chunks are one longer, as the native ``observe`` has it.
    """
    size, longer = divmod(channels, num_seeds)
    return [(seed * size + min(seed, longer), size + (seed < longer)) for seed in range(num_seeds)]


@dataclass(frozen=True)
class SiteShapes:
    """Shapes at a layer, with None where any size may come."""

    inp: Shape
    out: Shape
    channel_dim: int
    shares_positions: bool

    @property
    def channels(self) -> int:
        channels = self.out[self.channel_dim]
        assert channels is not None
        return channels


def declared_shapes(kind: SiteType) -> SiteShapes | None:
    """Return what the module's own attributes tell, or None if a forward has to be seen first."""
    if kind.declared is None:
        return None
    inp, out = kind.declared
    return SiteShapes(inp, out, kind.channel_dim(len(out)), kind.shares_positions)


def observed_shapes(kind: SiteType, inp: Tensor, out: Tensor) -> SiteShapes | None:
    """Read the shapes off one forward: feature sizes are kept, batch and space stay open.

    Returns None for a call without a batch, such as a Conv2d's on (C, H, W): no kernel is made for
    those. Raises ``ValueError`` if the output has no such dimension as ``kind`` says.
    """
    channel_dim = kind.channel_dim(out.dim())
    if not 0 <= channel_dim < out.dim():
        raise ValueError(
            f"the channel dimension is said to be {channel_dim}, but the output of {kind.host} "
            f"has shape {tuple(out.shape)}"
        )
    if channel_dim == kind.batch_dim:
        return None
    alike = inp.is_floating_point() and inp.dim() == out.dim()
    shares = (
        kind.shares_positions
        and alike
        and _positions(inp, channel_dim) == _positions(out, channel_dim)
    )
    return SiteShapes(
        _keep(inp, channel_dim if alike else None),
        _keep(out, channel_dim),
        channel_dim,
        shares_positions=bool(kind.geometry) or shares,  # a geometry tells where positions go
    )


def _keep(tensor: Tensor, kept_dim: int | None) -> Shape:
    return tuple(size if dim == kept_dim else None for dim, size in enumerate(tensor.shape))


def _positions(tensor: Tensor, channel_dim: int) -> torch.Size:
    return tensor.shape[:channel_dim] + tensor.shape[channel_dim + 1 :]


def signature(kind: SiteType, shapes: SiteShapes, length: int) -> SiteSignature:
    """Return what a kernel for a chunk of ``length`` channels of this layer must fit."""
    act = tuple(
        length if dim == shapes.channel_dim else size for dim, size in enumerate(shapes.out)
    )
    return SiteSignature(
        host=kind.host,
        inp_shape=shapes.inp,
        act_shape=act,
        channel_dim=shapes.channel_dim,
        batch_dim=kind.batch_dim if len(act) > 2 else 0,
        shares_positions=shapes.shares_positions,
        **kind.geometry,
    )
