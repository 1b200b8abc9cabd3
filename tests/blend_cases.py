"""Shapes, layouts and cells for the tests of blending, native and Triton alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    channel_dim: int
    start: int
    size: int

    @property
    def out_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.channel_dim] = self.size
        return tuple(shape)


CASES = (
    Case((4, 10), 1, 2, 3),
    Case((4, 10), 1, 0, 10),  # the chunk is everything
    Case((2, 3, 8), -1, 5, 3),  # channels last in the shape, chunk at the end
    Case((3, 8, 5, 7), 1, 1, 4),  # images
    Case((6, 4), 0, 1, 3),  # channels first
    Case((7,), 0, 2, 1),
    Case((1, 1), 1, 0, 1),
    Case((0, 6), 1, 2, 2),  # no rows
    Case((5, 6), 1, 2, 0),  # no channels in the chunk
    Case((3, 5, 20_011), 1, 1, 3),  # rows of several blocks, the chunk in the middle ones
    Case((130, 300), 1, 100, 77),  # several blocks of rows
)


@dataclass(frozen=True)
class Cells:
    """The fields of one seed that blending reads and writes."""

    alpha: Tensor
    non_finite: Tensor
    fault: Tensor


def make_cells(alpha: float, device: str = "cpu") -> Cells:
    return Cells(
        torch.tensor([alpha], device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, dtype=torch.uint8, device=device),
    )


def laid_out(t: Tensor, layout: str, channel_dim: int) -> Tensor:
    """Return the values of ``t`` in another memory layout."""
    match layout:
        case "channels_last":
            return t.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
        case "transposed":
            return t.movedim(0, -1).contiguous().movedim(-1, 0)
        case "strided":
            return torch.stack([t, t], -1)[..., 0]
        case _:
            return t.contiguous()


def samples(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> list[Tensor]:
    """Return y, out and grad, not finite here and there once the chunk is large enough."""
    y = torch.randn(case.shape).to(dtype)
    out = torch.randn(case.out_shape).to(dtype)
    grad = torch.randn(case.shape).to(dtype)
    if out.numel() > 3:
        out.view(-1)[0], out.view(-1)[2] = torch.nan, -torch.inf
        chunk = grad.narrow(case.channel_dim, case.start, case.size)
        for place, value in ((0, -torch.inf), (-2, torch.nan), (-1, torch.inf)):
            chunk[torch.unravel_index(torch.tensor(place % chunk.numel()), chunk.shape)] = value
    return [laid_out(t, layout, case.channel_dim).to(device) for t in (y, out, grad)]
