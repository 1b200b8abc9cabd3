"""Shapes, layouts and cells for the tests of blending, native and Triton alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")


@dataclass(frozen=True)
class Case:
    """A host's output, and the chunks of channels that seeds of its layer blend into it."""

    shape: tuple[int, ...]
    channel_dim: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        chunks = "+".join(f"{start}:{size}" for start, size in zip(*self.chunks, strict=True))
        return f"{'x'.join(map(str, self.shape))}[{self.channel_dim}]{chunks}"

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.starts, self.sizes

    @property
    def num_seeds(self) -> int:
        return len(self.sizes) + 1  # one blends nothing

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed but seed 1, last first."""
        return tuple(seed for seed in reversed(range(self.num_seeds)) if seed != 1)

    @property
    def out_shapes(self) -> list[tuple[int, ...]]:
        shapes = []
        for size in self.sizes:
            shape = list(self.shape)
            shape[self.channel_dim] = size
            shapes.append(tuple(shape))
        return shapes


CASES = (
    Case((4, 10), 1, (2,), (3,)),
    Case((4, 10), 1, (0,), (10,)),  # the chunk is everything
    Case((4, 10), 1, (6, 0, 3), (4, 3, 3)),  # the chunks are everything, in no order
    Case((2, 3, 8), -1, (5,), (3,)),  # channels last in the shape, chunk at the end
    Case((3, 8, 5, 7), 1, (1, 6), (4, 1)),  # images
    Case((6, 4), 0, (1,), (3,)),  # channels first
    Case((7,), 0, (2, 4), (1, 2)),
    Case((1, 1), 1, (0,), (1,)),
    Case((0, 6), 1, (2, 4), (2, 1)),  # no rows
    Case((5, 6), 1, (2,), (0,)),  # no channels in the chunk
    Case((5, 6), 1, (4, 2, 2), (1, 2, 0)),  # nor in one among several
    Case((3, 11), 1, (10, 9, 8, 7, 6, 5, 3, 2, 0), (1, 1, 1, 1, 1, 1, 2, 1, 1)),  # nine seeds
    Case((3, 5, 20_011), 1, (1, 4), (3, 1)),  # rows of several tiles, the chunks across them
    Case((130, 300), 1, (100, 0, 200), (77, 64, 100)),  # several tiles of rows
)
SMALL_CASES = CASES[:9]


@dataclass(frozen=True)
class Fields:
    """The layer's slice of the seed bank, as far as blending reads and writes it."""

    alpha: Tensor
    non_finite: Tensor
    fault: Tensor


def make_fields(alphas: Sequence[float], device: str = "cpu") -> Fields:
    return Fields(
        torch.tensor(alphas, device=device),
        torch.zeros(len(alphas), device=device),
        torch.zeros(len(alphas), dtype=torch.uint8, device=device),
    )


def make_cells(alpha: float, device: str = "cpu") -> Fields:
    """Return the fields of a single seed."""
    return make_fields([alpha], device)


def fields_of(case: Case, weight: float, device: str = "cpu") -> Fields:
    """Return fields in which the first out's seed has alpha ``weight`` and the others differ."""
    alphas = [0.9] * case.num_seeds
    for seed, alpha in zip(case.seeds, cycle((weight, 0.0, 0.8, 1.0, 0.2)), strict=False):
        alphas[seed] = alpha
    return make_fields(alphas, device)


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


def samples(
    case: Case, dtype: torch.dtype, layout: str, device: str = "cpu"
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return y, outs and grad, not finite here and there once a chunk is large enough."""
    y = torch.randn(case.shape).to(dtype)
    outs = [torch.randn(shape).to(dtype) for shape in case.out_shapes]
    grad = torch.randn(case.shape).to(dtype)
    for out, start in zip(outs, case.starts, strict=True):
        if out.numel() <= 3:
            continue
        out.view(-1)[0], out.view(-1)[2] = torch.nan, -torch.inf
        chunk = grad.narrow(case.channel_dim, start, out.size(case.channel_dim))
        for place, value in ((0, -torch.inf), (-2, torch.nan), (-1, torch.inf)):
            chunk[torch.unravel_index(torch.tensor(place % chunk.numel()), chunk.shape)] = value
    y, grad, *outs = (laid_out(t, layout, case.channel_dim).to(device) for t in (y, grad, *outs))
    return y, outs, grad
