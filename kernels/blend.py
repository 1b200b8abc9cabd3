"""Blending forward and backward in Triton: the CUDA kernels of ``esper::blend``.

One pass over the host's output; alpha and the seed's counters are read and written on the device.
The formulas are those of ``esper.reference``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 1024
MAX_INT32 = 2**31 - 1


@triton.jit
def _lerp(y, out, weight):
    rest = 1 - weight
    from_y = y + (weight * out - weight * y)
    from_out = out - (rest * out - rest * y)
    return tl.where(weight < 0.5, from_y, from_out)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _locate(
    n_elements,
    row_size,
    chunk_begin,
    chunk_size,
    BLOCK_SIZE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Elements of this program, and where those inside the chunk lie in `out`."""
    offsets = tl.program_id(0).to(INDEX) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    row = offsets // row_size
    column = offsets - row * row_size - chunk_begin
    inside = mask & (column >= 0) & (column < chunk_size)
    return offsets, mask, inside, row * chunk_size + column


@triton.jit
def _blend_fwd_kernel(
    y_ptr,
    out_ptr,
    alpha_ptr,
    result_ptr,
    non_finite_ptr,
    fault_ptr,
    n_elements,
    row_size,
    chunk_begin,
    chunk_size,
    BLOCK_SIZE: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    offsets, mask, inside, out_offsets = _locate(
        n_elements, row_size, chunk_begin, chunk_size, BLOCK_SIZE, INDEX
    )
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    out = tl.load(out_ptr + out_offsets, mask=inside, other=0)
    usable = _is_finite(out.to(COMPUTE))
    mixed = _lerp(y.to(COMPUTE), out.to(COMPUTE), alpha).to(y.dtype)
    # Ends are copied, not computed: the sign of a zero and the host's own NaN survive.
    blended = tl.where(alpha == 0, y, tl.where(alpha == 1, out, mixed))
    tl.store(result_ptr + offsets, tl.where(inside & usable, blended, y), mask=mask)

    lost = inside & (usable == 0) & _is_finite(y.to(COMPUTE))
    n_lost = tl.sum(lost.to(tl.int32), axis=0)
    if n_lost > 0:
        tl.atomic_add(non_finite_ptr, n_lost.to(tl.float32))
        tl.store(fault_ptr, 1)


@triton.jit
def _blend_bwd_kernel(
    grad_ptr,
    y_ptr,
    out_ptr,
    alpha_ptr,
    grad_y_ptr,
    grad_out_ptr,
    partial_ptr,
    n_elements,
    row_size,
    chunk_begin,
    chunk_size,
    BLOCK_SIZE: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    offsets, mask, inside, out_offsets = _locate(
        n_elements, row_size, chunk_begin, chunk_size, BLOCK_SIZE, INDEX
    )
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0)
    y = tl.load(y_ptr + offsets, mask=inside, other=0).to(COMPUTE)
    out = tl.load(out_ptr + out_offsets, mask=inside, other=0).to(COMPUTE)
    usable = inside & _is_finite(out)
    wide = grad.to(COMPUTE)
    sound = usable & _is_finite(wide)
    grad_y = tl.where(usable, (wide * (1 - alpha)).to(grad.dtype), grad)
    grad_out = tl.where(sound, wide * alpha, 0).to(grad.dtype)
    tl.store(grad_y_ptr + offsets, grad_y, mask=mask)
    tl.store(grad_out_ptr + out_offsets, grad_out, mask=inside)
    slope = tl.where(sound, wide * (out - y), 0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(slope, axis=0))


@dataclass(frozen=True)
class _Site:
    """Where the chunk lies in memory, once all tensors are in one of two memory orders."""

    dim: int
    channels_last: bool
    row_size: int
    chunk_begin: int
    chunk_size: int

    @classmethod
    def of(cls, y: Tensor, out: Tensor, channel_dim: int, start: int) -> "_Site":
        dim = channel_dim % y.dim()
        channels_last = not y.is_contiguous() and y.movedim(dim, -1).is_contiguous()
        inner = 1 if channels_last else y.shape[dim + 1 :].numel()
        return cls(dim, channels_last, y.size(dim) * inner, start * inner, out.size(dim) * inner)

    def in_order(self, t: Tensor) -> Tensor:
        if not self.channels_last:
            return t.contiguous()
        return t.movedim(self.dim, -1).contiguous().movedim(-1, self.dim)

    def launch(self, kernel, tensors: tuple[Tensor, ...], y: Tensor) -> None:
        index = tl.int64 if y.numel() + BLOCK_SIZE > MAX_INT32 else tl.int32
        compute = tl.float64 if y.dtype == torch.float64 else tl.float32
        kernel[(_num_programs(y),)](
            *tensors,
            y.numel(),
            self.row_size,
            self.chunk_begin,
            self.chunk_size,
            BLOCK_SIZE=BLOCK_SIZE,
            INDEX=index,
            COMPUTE=compute,
        )


def _num_programs(y: Tensor) -> int:
    return triton.cdiv(y.numel(), BLOCK_SIZE)


def blend(
    y: Tensor,
    out: Tensor,
    alpha: Tensor,
    channel_dim: int,
    start: int,
    non_finite: Tensor,
    fault: Tensor,
) -> Tensor:
    """Do what ``esper.ops.blend`` promises; the arguments are checked as the native ops do."""
    _check(y, out, alpha, channel_dim, start)
    _check_cell("non_finite", non_finite, torch.float32, y)
    _check_cell("fault", fault, torch.uint8, y)
    site = _Site.of(y, out, channel_dim, start)
    y, out = site.in_order(y), site.in_order(out)
    result = torch.empty_like(y)
    if y.numel() > 0:
        with torch.cuda.device_of(y):
            site.launch(_blend_fwd_kernel, (y, out, alpha, result, non_finite, fault), y)
    return result


def blend_backward(
    grad: Tensor, y: Tensor, out: Tensor, alpha: Tensor, channel_dim: int, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`blend` with respect to ``y``, ``out`` and ``alpha``.

    A non-finite element of ``grad`` reaches ``y`` alone.
    """
    _check(y, out, alpha, channel_dim, start)
    if (grad.shape, grad.dtype, grad.device) != (y.shape, y.dtype, y.device):
        raise RuntimeError(
            f"grad must be like y, {tuple(y.shape)} {y.dtype} on {y.device}, "
            f"got {tuple(grad.shape)} {grad.dtype} on {grad.device}"
        )
    site = _Site.of(y, out, channel_dim, start)
    grad, y, out = site.in_order(grad), site.in_order(y), site.in_order(out)
    grad_y, grad_out = torch.empty_like(y), torch.empty_like(out)
    wide = torch.promote_types(y.dtype, torch.float32)
    partials = torch.empty(_num_programs(y), dtype=wide, device=y.device)
    if y.numel() > 0:
        with torch.cuda.device_of(y):
            tensors = (grad, y, out, alpha, grad_y, grad_out, partials)
            site.launch(_blend_bwd_kernel, tensors, y)
    # torch.sum takes an order fixed by the shape, unlike atomics.
    grad_alpha = partials.sum(dtype=torch.float64).to(alpha.dtype).view_as(alpha)
    return grad_y, grad_out, grad_alpha


def _check(y: Tensor, out: Tensor, alpha: Tensor, channel_dim: int, start: int) -> None:
    _check_cell("alpha", alpha, torch.float32, y)
    if (out.dtype, out.device) != (y.dtype, y.device):
        raise RuntimeError(
            f"out must be {y.dtype} on {y.device} like y, got {out.dtype} on {out.device}"
        )
    if not y.dtype.is_floating_point:
        raise RuntimeError(f"y must be float32, float64, float16 or bfloat16, got {y.dtype}")
    if not -y.dim() <= channel_dim < y.dim():
        raise RuntimeError(
            f"channel_dim must be a dimension of y of shape {tuple(y.shape)}, got {channel_dim}"
        )
    channels = out.size(channel_dim) if out.dim() == y.dim() else -1
    expected = list(y.shape)
    expected[channel_dim] = channels
    if list(out.shape) != expected:
        raise RuntimeError(
            f"out must have y's shape {tuple(y.shape)} except at channel_dim {channel_dim}, "
            f"got {tuple(out.shape)}"
        )
    if not 0 <= start <= y.size(channel_dim) - channels:
        raise RuntimeError(
            f"start must lie in [0, {y.size(channel_dim) - channels}] for {channels} channels "
            f"of {y.size(channel_dim)}, got {start}"
        )


def _check_cell(name: str, cell: Tensor, dtype: torch.dtype, y: Tensor) -> None:
    if (cell.dtype, cell.numel(), cell.device) != (dtype, 1, y.device):
        raise RuntimeError(
            f"{name} must have one element of {dtype} on {y.device}, "
            f"got shape {tuple(cell.shape)} of {cell.dtype} on {cell.device}"
        )
