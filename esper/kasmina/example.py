"""Inputs that fit a site, for tracing designs and for trying kernels out."""

import torch
from torch import Tensor

from esper.contracts import SiteSignature

_FREE_SIZE = 6  # of a dimension that may have any size


def example_inputs(
    site: SiteSignature,
    dtype: str,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(inp, act)`` on the CPU, standard normal, of the shapes that the host would give.

    An embedding's input is zeros of int64. Where positions of ``inp`` and ``act`` do not correspond
    their sizes differ, so that a design that maps one onto the other fails.
    """
    inp_shape = _inp_shape(site, batch_size)
    act_shape = _act_shape(site, inp_shape, batch_size)
    act = torch.randn(act_shape, generator=generator).to(getattr(torch, dtype))
    if takes_indices(site):
        return torch.zeros(inp_shape, dtype=torch.int64), act
    return torch.randn(inp_shape, generator=generator).to(act.dtype), act


def takes_indices(site: SiteSignature) -> bool:
    """Tell whether the host's input holds indices, so that nothing can be learned from it."""
    return site.host in {"Embedding", "EmbeddingBag"}


def _inp_shape(site: SiteSignature, batch_size: int) -> tuple[int, ...]:
    free = [dim for dim, size in enumerate(site.inp_shape) if size is None]
    # Sizes differ from each other, lest a graph take two dimensions for one.
    sizes = {dim: _FREE_SIZE + dim + _reach(site, _spatial(site, dim)) for dim in free}
    sizes[site.batch_dim] = batch_size
    return tuple(sizes[dim] if size is None else size for dim, size in enumerate(site.inp_shape))


def _act_shape(site: SiteSignature, inp_shape: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
    def size_of(dim: int) -> int:
        if dim == site.batch_dim:
            return batch_size
        if site.kernel_size or site.shares_positions:
            return _convolved(site, _spatial(site, dim), inp_shape[dim])
        return _FREE_SIZE + len(inp_shape) + dim

    return tuple(size_of(dim) if size is None else size for dim, size in enumerate(site.act_shape))


def _spatial(site: SiteSignature, dim: int) -> int:
    """Return which of the host's convolved dimensions ``dim`` is; negative if none."""
    return dim - (len(site.inp_shape) - len(site.kernel_size))


def _reach(site: SiteSignature, spatial: int) -> int:
    if spatial < 0:
        return 0
    return site.dilation[spatial] * (site.kernel_size[spatial] - 1)


def _convolved(site: SiteSignature, spatial: int, size: int) -> int:
    """Return the size of the host's output there, for ``output_padding=0``."""
    if spatial < 0:
        return size
    stride, padding = site.stride[spatial], site.padding[spatial]
    if is_transposed(site):
        return (size - 1) * stride - 2 * padding + _reach(site, spatial) + 1
    return (size + 2 * padding - _reach(site, spatial) - 1) // stride + 1


def is_transposed(site: SiteSignature) -> bool:
    return site.host.startswith("ConvTranspose")
