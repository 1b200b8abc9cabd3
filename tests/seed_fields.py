"""Typed views of a seed bank's block, for tests that look at single fields."""

import torch
from torch import Tensor

from esper._host import SeedBlock


def fields_of(block: SeedBlock, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Return the arena as bytes and a view of each of its fields."""
    arena = torch.frombuffer(block, dtype=torch.uint8).to(device)
    views = {}
    for name, (offset, dtype_name, shape) in block.fields().items():
        dtype = getattr(torch, dtype_name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        views[name] = arena[offset : offset + nbytes].view(dtype).view(shape)
    return arena, views
