"""Blending forward and backward in Triton: the CUDA kernels of ``esper::blend``.

One pass over the host's output, in one launch for up to eight seeds; alpha and the seeds' counters
are read and written on the device. The formulas are those of ``esper.reference``.

A tensor is a matrix with channels for columns. It is divided into *segments* of columns, each with
one seed's chunk in it and what is to be copied around that. Programs of the grid's second axis work
on one segment each, those of the first on its tiles, so that no element has to find its place by a
division.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction

BLOCK_SIZE = 1024
MIN_BLOCK_COLUMNS = 16
MAX_SEGMENTS = 8  # in one launch
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


# Triton compiles a kernel anew where an integer of a tuple is 1 or a multiple of 16, whatever
# do_not_specialize says; odd numbers above 1 spare every choice of seeds a kernel of its own.
def _encode(seed: int) -> int:
    return 2 * seed + 3


@triton.jit
def _decode(seed_code):
    return (seed_code - 3) // 2


@triton.jit
def _locate(
    low,
    high,
    n_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Rows and columns of this program's tile of the segment [low, high), and which exist."""
    column_tiles = tl.cdiv(high - low, BLOCK_COLUMNS)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) - row_tile * column_tiles
    rows = row_tile.to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = low + column_tile.to(INDEX) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return rows, columns, (rows < n_rows) & (columns < high)


@triton.jit
def _blend_segment(
    y_ptr,
    out_ptr,
    result_ptr,
    alpha_ptr,
    non_finite_ptr,
    fault_ptr,
    low,
    begin,
    end,
    high,
    n_rows,
    row_size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    rows, columns, mask = _locate(low, high, n_rows, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    inside = mask & (columns >= begin) & (columns < end)
    offsets = rows * row_size + columns
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    out = tl.load(out_ptr + rows * (end - begin) + (columns - begin), mask=inside, other=0)
    usable = _is_finite(out.to(COMPUTE))
    mixed = _lerp(y.to(COMPUTE), out.to(COMPUTE), alpha).to(y.dtype)
    # Ends are copied, not computed: the sign of a zero and the host's own NaN survive.
    blended = tl.where(alpha == 0, y, tl.where(alpha == 1, out, mixed))
    tl.store(result_ptr + offsets, tl.where(inside & usable, blended, y), mask=mask)

    lost = inside & (usable == 0) & _is_finite(y.to(COMPUTE))
    n_lost = tl.sum(lost.to(tl.int32))
    if n_lost > 0:
        tl.atomic_add(non_finite_ptr, n_lost.to(tl.float32))
        tl.store(fault_ptr, 1)


@triton.jit
def _blend_fwd_kernel(
    y_ptr,
    out_ptrs,
    result_ptr,
    alpha_ptr,
    non_finite_ptr,
    fault_ptr,
    seed_codes,
    lows,
    begins,
    ends,
    highs,
    n_rows,
    row_size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    for i in tl.static_range(len(out_ptrs)):
        if tl.program_id(1) == i:
            seed = _decode(seed_codes[i])
            _blend_segment(
                y_ptr,
                out_ptrs[i],
                result_ptr,
                alpha_ptr + seed,
                non_finite_ptr + seed,
                fault_ptr + seed,
                lows[i],
                begins[i],
                ends[i],
                highs[i],
                n_rows,
                row_size,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                INDEX,
                COMPUTE,
            )


@triton.jit
def _blend_segment_backward(
    grad_ptr,
    y_ptr,
    out_ptr,
    alpha_ptr,
    grad_y_ptr,
    grad_out_ptr,
    partial_ptr,
    low,
    begin,
    end,
    high,
    n_rows,
    row_size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    rows, columns, mask = _locate(low, high, n_rows, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    inside = mask & (columns >= begin) & (columns < end)
    offsets = rows * row_size + columns
    out_offsets = rows * (end - begin) + (columns - begin)
    alpha = tl.load(alpha_ptr).to(COMPUTE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0)
    out = tl.load(out_ptr + out_offsets, mask=inside, other=0).to(COMPUTE)
    usable = inside & _is_finite(out)
    wide = grad.to(COMPUTE)
    sound = usable & _is_finite(wide)
    if grad_y_ptr is not None:
        grad_y = tl.where(usable, (wide * (1 - alpha)).to(grad.dtype), grad)
        tl.store(grad_y_ptr + offsets, grad_y, mask=mask)
    if grad_out_ptr is not None:
        grad_out = tl.where(sound, wide * alpha, 0).to(grad.dtype)
        tl.store(grad_out_ptr + out_offsets, grad_out, mask=inside)
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=inside, other=0).to(COMPUTE)
        tl.store(partial_ptr, tl.sum(tl.where(sound, wide * (out - y), 0)))


@triton.jit
def _blend_bwd_kernel(
    grad_ptr,
    y_ptr,
    out_ptrs,
    alpha_ptr,
    grad_y_ptr,
    grad_out_ptrs,
    partial_ptr,
    seed_codes,
    lows,
    begins,
    ends,
    highs,
    n_rows,
    row_size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    for i in tl.static_range(len(out_ptrs)):
        if tl.program_id(1) == i:
            seed = _decode(seed_codes[i])
            partial = seed * tl.num_programs(0) + tl.program_id(0)
            _blend_segment_backward(
                grad_ptr,
                y_ptr,
                out_ptrs[i],
                alpha_ptr + seed,
                grad_y_ptr,
                grad_out_ptrs[i],
                None if partial_ptr is None else partial_ptr + partial,
                lows[i],
                begins[i],
                ends[i],
                highs[i],
                n_rows,
                row_size,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                INDEX,
                COMPUTE,
            )


@dataclass(frozen=True)
class _Segment:
    """Columns [low, high) of the matrix, of which [begin, end) are the chunk of out ``i``."""

    i: int
    seed: int
    low: int
    begin: int
    end: int
    high: int


@dataclass(frozen=True)
class _Matrix:
    """A tensor as a matrix with channels for columns, in one of two memory orders."""

    dim: int
    channels_last: bool
    n_rows: int
    row_size: int
    inner: int  # columns per channel

    @classmethod
    def of(cls, t: Tensor, channel_dim: int) -> "_Matrix":
        dim = channel_dim % t.dim()
        channels_last = not t.is_contiguous() and t.movedim(dim, -1).is_contiguous()
        inner = 1 if channels_last else t.shape[dim + 1 :].numel()
        row_size = t.size(dim) * inner
        return cls(dim, channels_last, t.numel() // max(row_size, 1), row_size, inner)

    def in_order(self, t: Tensor) -> Tensor:
        if not self.channels_last:
            return t.contiguous()
        return t.movedim(self.dim, -1).contiguous().movedim(-1, self.dim)

    def chunks(
        self, outs: Sequence[Tensor], seeds: Sequence[int], starts: Sequence[int]
    ) -> list[_Segment]:
        """Return segments that are the chunks and no more, those without elements left out."""
        chunks = []
        for i in sorted(range(len(outs)), key=starts.__getitem__):
            begin = starts[i] * self.inner
            end = begin + outs[i].size(self.dim) * self.inner
            if begin < end:
                chunks.append(_Segment(i, seeds[i], begin, begin, end, end))
        return chunks

    def covering(self, chunks: list[_Segment]) -> list[_Segment]:
        """Return the chunks with what lies between them, so that nothing is left out."""
        lows = [0, *(chunk.begin for chunk in chunks[1:])]
        highs = [*lows[1:], self.row_size]
        return [
            replace(chunk, low=low, high=high)
            for chunk, low, high in zip(chunks, lows, highs, strict=True)
        ]

    def launches(self, segments: list[_Segment]) -> "Iterator[_Launch]":
        for first in range(0, len(segments), MAX_SEGMENTS):
            yield _Launch.of(self, segments[first : first + MAX_SEGMENTS])


@dataclass(frozen=True)
class _Launch:
    segments: list[_Segment]
    n_rows: int
    row_size: int
    block_rows: int
    block_columns: int

    @classmethod
    def of(cls, matrix: _Matrix, segments: list[_Segment]) -> "_Launch":
        n_rows, row_size = matrix.n_rows, matrix.row_size
        if segments[0].end - segments[0].begin == row_size:
            # Rows that follow one another without a gap are one long row.
            whole = n_rows * row_size
            n_rows, row_size = 1, whole
            segments = [replace(segments[0], end=whole, high=whole)]
        widest = max(segment.high - segment.low for segment in segments)
        columns = max(MIN_BLOCK_COLUMNS, min(BLOCK_SIZE, triton.next_power_of_2(widest)))
        return cls(segments, n_rows, row_size, BLOCK_SIZE // columns, columns)

    @property
    def n_tiles(self) -> int:
        widest = max(segment.high - segment.low for segment in self.segments)
        rows, columns = self.block_rows, self.block_columns
        return triton.cdiv(self.n_rows, rows) * triton.cdiv(widest, columns)

    def pick(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return those of the values, one per out, that belong to the segments."""
        return tuple(values[segment.i] for segment in self.segments)

    def run(self, kernel: JITFunction, *operands: object, dtype: torch.dtype) -> None:
        n_elements = self.n_rows * self.row_size
        kernel[(self.n_tiles, len(self.segments))](
            *operands,
            tuple(_encode(segment.seed) for segment in self.segments),
            tuple(segment.low for segment in self.segments),
            tuple(segment.begin for segment in self.segments),
            tuple(segment.end for segment in self.segments),
            tuple(segment.high for segment in self.segments),
            self.n_rows,
            self.row_size,
            BLOCK_ROWS=self.block_rows,
            BLOCK_COLUMNS=self.block_columns,
            INDEX=tl.int64 if n_elements + BLOCK_SIZE > MAX_INT32 else tl.int32,
            COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
        )


def blend(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
) -> Tensor:
    """Do what ``esper.ops.blend`` promises; the arguments are checked as the native ops do."""
    _check("y", y, outs, seeds, starts, alpha, channel_dim)
    _check_counts(non_finite, fault, alpha)
    matrix = _Matrix.of(y, channel_dim)
    host = matrix.in_order(y)
    chunks = matrix.chunks(outs, seeds, starts)
    if not chunks or y.numel() == 0:
        return host.clone()
    result = torch.empty_like(host)
    segments = matrix.covering(chunks)
    _blend_segments(matrix, segments, host, outs, result, alpha, non_finite, fault)
    return result


def blend_(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
) -> None:
    """Do what ``esper.ops.blend`` promises in place; only the chunks are read and written.

    A ``y`` that is neither contiguous nor has its channels last is copied, and copied back.
    """
    _check("y", y, outs, seeds, starts, alpha, channel_dim)
    _check_counts(non_finite, fault, alpha)
    matrix = _Matrix.of(y, channel_dim)
    chunks = matrix.chunks(outs, seeds, starts)
    if y.numel() == 0:
        return
    host = matrix.in_order(y)
    _blend_segments(matrix, chunks, host, outs, host, alpha, non_finite, fault)
    if host is not y and host.data_ptr() != y.data_ptr():
        y.copy_(host)


def blend_backward(
    grad: Tensor,
    y: Tensor | None,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of :func:`blend` that are ``needed`` of ``y`` and of each of ``outs``.

    They come in that order, and last, where ``y`` is given, alpha's. A non-finite element of
    ``grad`` reaches ``y`` alone.
    """
    _check("grad", grad, outs, seeds, starts, alpha, channel_dim)
    _check_backward(grad, y, outs, needed)
    matrix = _Matrix.of(grad, channel_dim)
    grad, outs = matrix.in_order(grad), [matrix.in_order(out) for out in outs]
    host = None if y is None else matrix.in_order(y)
    needs_y, *needs_outs = needed
    grad_y = torch.empty_like(grad) if needs_y else None
    grad_outs = [
        torch.empty_like(out) if wanted else None
        for out, wanted in zip(outs, needs_outs, strict=True)
    ]
    grad_alpha = torch.zeros_like(alpha, dtype=torch.float64)
    segments = matrix.chunks(outs, seeds, starts) if grad.numel() > 0 else []
    if grad_y is not None and segments:
        segments = matrix.covering(segments)
    elif grad_y is not None:
        grad_y.copy_(grad)
    with torch.cuda.device_of(grad):
        for launch in matrix.launches(segments):
            partials = None
            if host is not None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                shape = len(alpha), launch.n_tiles
                partials = torch.zeros(shape, dtype=wide, device=grad.device)
            launch.run(
                _blend_bwd_kernel,
                grad,
                host,
                launch.pick(outs),
                alpha,
                grad_y,
                launch.pick(grad_outs),
                partials,
                dtype=grad.dtype,
            )
            if partials is not None:
                # torch.sum takes an order fixed by the shape, unlike atomics.
                grad_alpha += partials.sum(1, dtype=torch.float64)
    grads = [g for g in (grad_y, *grad_outs) if g is not None]
    return grads if host is None else [*grads, grad_alpha.to(alpha.dtype)]


def _blend_segments(
    matrix: _Matrix,
    segments: list[_Segment],
    host: Tensor,
    outs: Sequence[Tensor],
    result: Tensor,
    alpha: Tensor,
    non_finite: Tensor,
    fault: Tensor,
) -> None:
    outs = [matrix.in_order(out) for out in outs]
    with torch.cuda.device_of(host):
        for launch in matrix.launches(segments):
            picked = launch.pick(outs)
            operands = (host, picked, result, alpha, non_finite, fault)
            launch.run(_blend_fwd_kernel, *operands, dtype=host.dtype)


def _check(
    name: str,
    t: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
) -> None:
    if t.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{name} must be float32, float64, float16 or bfloat16, got {t.dtype}")
    _check_field("alpha", alpha, torch.float32, t.device)
    if not -t.dim() <= channel_dim < t.dim():
        raise RuntimeError(
            f"channel_dim must be a dimension of {name} of shape {tuple(t.shape)}, "
            f"got {channel_dim}"
        )
    if not outs:
        raise RuntimeError("outs must have at least one tensor, got none")
    if not len(seeds) == len(starts) == len(outs):
        raise RuntimeError(
            f"seeds and starts must be as many as the {len(outs)} outs, "
            f"got {len(seeds)} and {len(starts)}"
        )
    if min(seeds) < 0 or max(seeds) >= len(alpha):
        raise RuntimeError(
            f"seeds must lie in [0, {len(alpha)}), the length of alpha, got {list(seeds)}"
        )
    if len(set(seeds)) < len(seeds):
        raise RuntimeError(f"seeds must be distinct, got {list(seeds)}")
    for i, (out, start) in enumerate(zip(outs, starts, strict=True)):
        _check_chunk(name, t, i, out, start, channel_dim)
    _check_disjoint(outs, starts, channel_dim)


def _check_chunk(name: str, t: Tensor, i: int, out: Tensor, start: int, channel_dim: int) -> None:
    if (out.dtype, out.device) != (t.dtype, t.device):
        raise RuntimeError(
            f"outs[{i}] must be {t.dtype} on {t.device} like {name}, "
            f"got {out.dtype} on {out.device}"
        )
    channels = out.size(channel_dim) if out.dim() == t.dim() else -1
    expected = list(t.shape)
    expected[channel_dim] = channels
    if list(out.shape) != expected:
        raise RuntimeError(
            f"outs[{i}] must have {name}'s shape {tuple(t.shape)} except at channel_dim "
            f"{channel_dim}, got {tuple(out.shape)}"
        )
    if not 0 <= start <= t.size(channel_dim) - channels:
        raise RuntimeError(
            f"starts[{i}] must lie in [0, {t.size(channel_dim) - channels}] for {channels} "
            f"channels of {t.size(channel_dim)}, got {start}"
        )


def _check_disjoint(outs: Sequence[Tensor], starts: Sequence[int], channel_dim: int) -> None:
    sizes = [out.size(channel_dim) for out in outs]
    previous_end = 0
    for start, size, i in sorted(zip(starts, sizes, range(len(outs)), strict=True)):
        if size == 0:
            continue
        if start < previous_end:
            raise RuntimeError(
                f"outs must not overlap, but outs[{i}] begins at channel {start}, before channel "
                f"{previous_end} where another ends"
            )
        previous_end = start + size


def _check_backward(
    grad: Tensor, y: Tensor | None, outs: Sequence[Tensor], needed: Sequence[bool]
) -> None:
    if len(needed) != 1 + len(outs):
        raise RuntimeError(
            f"needed must tell of y and each of the {len(outs)} outs, got {len(needed)} values"
        )
    if y is not None and (grad.shape, grad.dtype, grad.device) != (y.shape, y.dtype, y.device):
        raise RuntimeError(
            f"y must be like grad, {tuple(grad.shape)} {grad.dtype} on {grad.device}, "
            f"got {tuple(y.shape)} {y.dtype} on {y.device}"
        )


def _check_counts(non_finite: Tensor, fault: Tensor, alpha: Tensor) -> None:
    _check_field("non_finite", non_finite, torch.float32, alpha.device)
    _check_field("fault", fault, torch.uint8, alpha.device)
    if not len(non_finite) == len(fault) == len(alpha):
        raise RuntimeError(
            f"non_finite and fault must be as long as alpha, {len(alpha)}, "
            f"got {len(non_finite)} and {len(fault)}"
        )


def _check_field(name: str, field: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if (field.dtype, field.device) != (dtype, device):
        raise RuntimeError(
            f"{name} must be {dtype} on {device}, got {field.dtype} on {field.device}"
        )
    if field.dim() != 1 or not field.is_contiguous():
        raise RuntimeError(
            f"{name} must be contiguous with one element per seed, got shape {tuple(field.shape)}"
        )
