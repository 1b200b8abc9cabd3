"""Which modules can carry seeds, and what a kernel there has to look like.

A site is a host module with one floating-point tensor as output. Its output's channels are
divided among the seeds in contiguous chunks. Shapes that the module itself does not tell (the
rank of a Linear's input, the width of an activation) are learned from the first forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts import SiteSignature

ChannelDim = Callable[[int], int]  # rank of the output -> channel dimension, non-negative
Shape = tuple[int | None, ...]


def _last(rank: int) -> int:
    return rank - 1


def _convolution_like(rank: int) -> int:
    """(N, C), (N, T, C) and (C,) put channels last; (N, C, H, W) and more put them second."""
    return 1 if rank >= 4 else rank - 1


def _second(rank: int) -> int:
    return 1


@dataclass(frozen=True)
class SiteType:
    """How to read a module type: where its channels are, and what it tells before a forward."""

    channel_dim: ChannelDim
    declared: Callable[[Any], tuple[Shape, Shape]] | None = None  # -> shapes of inp and output
    geometry: Callable[[Any], dict[str, tuple[int, ...]]] | None = None
    accepts: Callable[[Any], bool] = lambda _: True


def _linear_shapes(module: nn.Linear) -> tuple[Shape, Shape]:
    return (None, module.in_features), (None, module.out_features)


def _conv2d_shapes(module: nn.Conv2d) -> tuple[Shape, Shape]:
    return (None, module.in_channels, None, None), (None, module.out_channels, None, None)


def _same_padding(module: nn.Conv2d) -> list[int]:
    return [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]


def _is_padded_alike_on_both_sides(module: nn.Conv2d) -> bool:
    return module.padding != "same" or all(total % 2 == 0 for total in _same_padding(module))


def _conv2d_geometry(module: nn.Conv2d) -> dict[str, tuple[int, ...]]:
    padding = module.padding
    if isinstance(padding, str):
        padding = tuple(p // 2 if padding == "same" else 0 for p in _same_padding(module))
    return {
        "kernel_size": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "padding": tuple(padding),
        "dilation": tuple(module.dilation),
    }


_SITE_TYPES: dict[type[nn.Module], SiteType] = {
    nn.Linear: SiteType(_last, _linear_shapes),
    # An even kernel with "same" padding has more on one side, which no geometry of ours tells.
    nn.Conv2d: SiteType(
        _second, _conv2d_shapes, _conv2d_geometry, accepts=_is_padded_alike_on_both_sides
    ),
    nn.ReLU: SiteType(_convolution_like),
    nn.GELU: SiteType(_convolution_like),
    nn.Tanh: SiteType(_convolution_like),
    nn.Sigmoid: SiteType(_convolution_like),
}


def site_type(module: nn.Module) -> SiteType | None:
    """Return how to read ``module``, by its exact type, or None if it can carry no seeds.

    Subclasses do not inherit: what their forward returns is not known here.
    """
    kind = _SITE_TYPES.get(type(module))
    return kind if kind is not None and kind.accepts(module) else None


def site_type_names() -> list[str]:
    return sorted(host.__name__ for host in _SITE_TYPES)


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

    @property
    def channels(self) -> int:
        channels = self.out[self.channel_dim]
        assert channels is not None
        return channels


def declared_shapes(module: nn.Module, kind: SiteType) -> SiteShapes | None:
    """Return what the module's own attributes tell, or None if a forward has to be seen first."""
    if kind.declared is None:
        return None
    inp, out = kind.declared(module)
    return SiteShapes(inp, out, kind.channel_dim(len(out)))


def observed_shapes(kind: SiteType, inp: Tensor, out: Tensor) -> SiteShapes:
    """Read the shapes off one forward: feature sizes are kept, batch and space stay open."""

    def keep(shape: torch.Size, dim: int) -> Shape:
        return tuple(size if d == dim else None for d, size in enumerate(shape))

    channel_dim = kind.channel_dim(out.dim())
    return SiteShapes(
        keep(inp.shape, kind.channel_dim(inp.dim())), keep(out.shape, channel_dim), channel_dim
    )


def signature(
    module: nn.Module, host: str, kind: SiteType, shapes: SiteShapes, length: int
) -> SiteSignature:
    """Return what a kernel for a chunk of ``length`` channels of this layer must fit."""
    act = tuple(
        length if dim == shapes.channel_dim else size for dim, size in enumerate(shapes.out)
    )
    return SiteSignature(
        host=host,
        inp_shape=shapes.inp,
        act_shape=act,
        channel_dim=shapes.channel_dim,
        **(kind.geometry(module) if kind.geometry else {}),
    )
