"""Bottlenecks in Triton: the CUDA kernels of ``esper::bottleneck_`` and its backward.

cuBLAS multiplies where a product stands alone; what surrounds the products is fused here. Alpha and
the seeds' counters are read and written on the device. The formulas are those of
``esper.reference``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 32
BLOCK_CHANNELS = 64
BLOCK_RANK = 32
BLOCK_SIZE = 1024

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU = tl.constexpr(4)
TANH = tl.constexpr(5)
SIGMOID = tl.constexpr(6)
NUM_ACTIVATIONS = 7


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _tanh(z):
    # Near 0 the difference would cancel all digits; there the series is exact in float64.
    square = z * z
    series = z * (1 + square * (-1 / 3 + square * (2 / 15)))
    return tl.where(tl.abs(z) < 0.005, series, 2 * tl.sigmoid(2 * z) - 1)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z < 0, 0, z)
    elif ACTIVATION == GELU:
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        return 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == SILU:
        return z * tl.sigmoid(z)
    elif ACTIVATION == TANH:
        return _tanh(z)
    elif ACTIVATION == SIGMOID:
        return tl.sigmoid(z)
    else:
        return z


@triton.jit
def _activate_bwd(grad, z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z <= 0, 0, grad)
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return grad * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == GELU_TANH:
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)
        return grad * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner_slope)
    elif ACTIVATION == SILU:
        s = tl.sigmoid(z)
        return grad * (s * (1 + z * (1 - s)))
    elif ACTIVATION == TANH:
        t = _tanh(z)
        return grad * (1 - t * t)
    elif ACTIVATION == SIGMOID:
        s = tl.sigmoid(z)
        return grad * (s * (1 - s))
    else:
        return grad


@triton.jit
def _locate(n_rows, chunk, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Rows and columns of this program's tile of the seed's chunk, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return rows, columns, (rows < n_rows)[:, None] & (columns < chunk)[None, :]


@triton.jit
def _branch(
    hidden_ptr,
    up_ptr,
    up_bias_ptr,
    s,
    rows,
    columns,
    n_rows,
    hidden_size,
    rank,
    chunk,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Tile of f(hidden) @ up.T + up_bias of seed ``s``."""
    branch = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), COMPUTE)
    for first in range(0, rank, BLOCK_RANK):
        k = first + tl.arange(0, BLOCK_RANK)
        z = tl.load(
            hidden_ptr + rows[:, None] * hidden_size + s * rank + k[None, :],
            mask=(rows < n_rows)[:, None] & (k < rank)[None, :],
            other=0,
        )
        up = tl.load(
            up_ptr + (s * chunk + columns)[None, :] * rank + k[:, None],
            mask=(columns < chunk)[None, :] & (k < rank)[:, None],
            other=0,
        )
        a = _activate(z.to(COMPUTE), ACTIVATION).to(z.dtype)
        branch = tl.dot(a, up, branch, input_precision="ieee", out_dtype=COMPUTE)
    if HAS_BIAS:
        bias = tl.load(up_bias_ptr + s * chunk + columns, mask=columns < chunk, other=0)
        branch += bias.to(COMPUTE)[None, :]
    return branch


@triton.jit
def _bottleneck_fwd_kernel(
    y_ptr,
    hidden_ptr,
    up_ptr,
    up_bias_ptr,
    alpha_ptr,
    non_finite_ptr,
    fault_ptr,
    lost_ptr,
    n_rows,
    n_channels,
    hidden_size,
    rank,
    chunk,
    first,
    seed,
    seed_step,
    start,
    start_step,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    group = tl.program_id(2)
    cell = seed + group * seed_step
    rows, columns, mask = _locate(n_rows, chunk, BLOCK_ROWS, BLOCK_CHANNELS)
    branch = _branch(
        hidden_ptr,
        up_ptr,
        up_bias_ptr,
        first + group,
        rows,
        columns,
        n_rows,
        hidden_size,
        rank,
        chunk,
        HAS_BIAS,
        ACTIVATION,
        BLOCK_ROWS,
        BLOCK_CHANNELS,
        BLOCK_RANK,
        COMPUTE,
    )
    alpha = tl.load(alpha_ptr + cell).to(COMPUTE)
    y_offsets = rows[:, None] * n_channels + (start + group * start_step + columns)[None, :]
    y = tl.load(y_ptr + y_offsets, mask=mask, other=0)
    act = y.to(COMPUTE)
    usable = _is_finite((act + branch).to(y.dtype).to(COMPUTE))
    # A product with zero would cost the host the sign of its zeros.
    moved = tl.where(alpha == 0, y, (act + alpha * branch).to(y.dtype))
    tl.store(y_ptr + y_offsets, moved, mask=mask & usable)

    broken = tl.sum(tl.sum((mask & (_is_finite(branch) == 0)).to(tl.int32), axis=1), axis=0)
    charged = mask & (usable == 0) & _is_finite(act)
    n_charged = tl.sum(tl.sum(charged.to(tl.int32), axis=1), axis=0)
    if broken > 0:
        tl.atomic_add(lost_ptr, broken)
    if n_charged > 0:
        tl.atomic_add(non_finite_ptr + cell, n_charged.to(tl.float32))
        tl.store(fault_ptr + cell, 1)


@triton.jit
def _branch_gradient_kernel(
    grad_ptr,
    hidden_ptr,
    up_ptr,
    up_bias_ptr,
    alpha_ptr,
    lost_ptr,
    grad_branch_ptr,
    n_rows,
    n_channels,
    hidden_size,
    rank,
    chunk,
    first,
    seed,
    seed_step,
    start,
    start_step,
    HAS_BIAS: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """alpha * grad of each seed's chunk, and 0 where that or the branch is not finite."""
    group = tl.program_id(2)
    rows, columns, mask = _locate(n_rows, chunk, BLOCK_ROWS, BLOCK_CHANNELS)
    grad_offsets = rows[:, None] * n_channels + (start + group * start_step + columns)[None, :]
    grad = tl.load(grad_ptr + grad_offsets, mask=mask, other=0)
    handed = grad.to(COMPUTE)
    sound = _is_finite(handed)
    if HAS_ALPHA:
        handed *= tl.load(alpha_ptr + seed + group * seed_step).to(COMPUTE)
        if tl.load(lost_ptr) > 0:
            branch = _branch(
                hidden_ptr,
                up_ptr,
                up_bias_ptr,
                first + group,
                rows,
                columns,
                n_rows,
                hidden_size,
                rank,
                chunk,
                HAS_BIAS,
                ACTIVATION,
                BLOCK_ROWS,
                BLOCK_CHANNELS,
                BLOCK_RANK,
                COMPUTE,
            )
            sound = sound & _is_finite(branch)
    offsets = ((first + group) * n_rows + rows)[:, None] * chunk + columns[None, :]
    tl.store(grad_branch_ptr + offsets, tl.where(sound, handed, 0).to(grad.dtype), mask=mask)


@triton.jit
def _activate_bwd_kernel(
    grad_a_ptr,
    hidden_ptr,
    a_ptr,
    grad_z_ptr,
    n_elements,
    n_rows,
    n_seeds,
    rank,
    ACTIVATION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """a = f(z) and the gradient of z; that of a lies seed after seed."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    row = offsets // (n_seeds * rank)
    column = offsets - row * (n_seeds * rank)
    s = column // rank
    by_seed = (s * n_rows + row) * rank + column - s * rank
    stored = tl.load(hidden_ptr + offsets, mask=mask, other=0)
    z = stored.to(COMPUTE)
    grad_a = tl.load(grad_a_ptr + by_seed, mask=mask, other=0).to(COMPUTE)
    tl.store(a_ptr + offsets, _activate(z, ACTIVATION).to(stored.dtype), mask=mask)
    grad_z = _activate_bwd(grad_a, z, ACTIVATION)
    tl.store(grad_z_ptr + offsets, grad_z.to(stored.dtype), mask=mask)


@triton.jit
def _make_finite_kernel(
    x_ptr,
    non_finite_ptr,
    fault_ptr,
    size,
    first,
    seed,
    seed_step,
    BLOCK_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Zero for what is not finite in each seed's ``size`` elements, counted and flagged."""
    group = tl.program_id(1)
    cell = seed + group * seed_step
    within = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = within < size
    offsets = (first + group).to(tl.int64) * size + within
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    bad = mask & (_is_finite(x.to(COMPUTE)) == 0)
    n_bad = tl.sum(bad.to(tl.int32), axis=0)
    if n_bad > 0:
        tl.store(x_ptr + offsets, tl.zeros_like(x), mask=bad)
        tl.atomic_add(non_finite_ptr + cell, n_bad.to(tl.float32))
        tl.store(fault_ptr + cell, 1)


@dataclass(frozen=True)
class _Run:
    """Seeds that one launch serves: their cells and channels follow each other evenly."""

    first: int
    count: int
    seed: int
    seed_step: int
    start: int
    start_step: int

    @classmethod
    def all_of(cls, seeds: Sequence[int], starts: Sequence[int]) -> "list[_Run]":
        steps = {
            (seeds[s + 1] - seeds[s], starts[s + 1] - starts[s]) for s in range(len(seeds) - 1)
        }
        if len(steps) <= 1:
            seed_step, start_step = steps.pop() if steps else (0, 0)
            return [cls(0, len(seeds), seeds[0], seed_step, starts[0], start_step)]
        pairs = enumerate(zip(seeds, starts, strict=True))
        return [cls(s, 1, seed, 0, start, 0) for s, (seed, start) in pairs]


def _compute(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _launch_tiles(
    kernel, tensors: tuple[Tensor, ...], t: Tensor, up: Tensor, runs: list[_Run], **constants
) -> None:
    n_rows, n_channels = t.shape[:-1].numel(), t.size(-1)
    n_seeds = sum(run.count for run in runs)
    chunk, rank = up.size(0) // n_seeds, up.size(1)
    if n_rows == 0 or chunk == 0:
        return
    with torch.cuda.device_of(t):
        for run in runs:
            grid = (triton.cdiv(n_rows, BLOCK_ROWS), triton.cdiv(chunk, BLOCK_CHANNELS), run.count)
            kernel[grid](
                *tensors,
                n_rows,
                n_channels,
                n_seeds * rank,
                rank,
                chunk,
                run.first,
                run.seed,
                run.seed_step,
                run.start,
                run.start_step,
                **constants,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_CHANNELS=BLOCK_CHANNELS,
                BLOCK_RANK=BLOCK_RANK,
                COMPUTE=_compute(t),
            )


@torch.autocast("cuda", enabled=False)
def bottleneck_(
    y: Tensor,
    inp: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: int,
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    non_finite: Tensor,
    fault: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what ``esper.bottleneck.bottleneck`` promises, in place; return ``inp @ down.T + down_bias``
    and how many elements of the branches are not finite, int32 (1,).
    """
    _check("y", y, inp, (down, down_bias, up, up_bias), activation, seeds, starts)
    _check_bank(y, seeds, alpha=alpha, non_finite=non_finite, fault=fault)
    hidden = F.linear(inp, down, down_bias).contiguous()
    lost = torch.zeros(1, dtype=torch.int32, device=y.device)
    target, up = y.contiguous(), up.contiguous()
    # Where there is no bias, any pointer will do.
    bias = up if up_bias is None else up_bias.contiguous()
    _launch_tiles(
        _bottleneck_fwd_kernel,
        (target, hidden, up, bias, alpha, non_finite, fault, lost),
        target,
        up,
        _Run.all_of(seeds, starts),
        HAS_BIAS=up_bias is not None,
        ACTIVATION=activation,
    )
    if target is not y:
        y.copy_(target)
    return hidden, lost


@torch.autocast("cuda", enabled=False)
def bottleneck_backward(
    grad: Tensor,
    inp: Tensor,
    hidden: Tensor,
    lost: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: int,
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor | None,
    non_finite: Tensor,
    fault: Tensor,
    needs_inp: bool,
    needs_weights: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of inp, down, down_bias, up and up_bias, empty where none is needed.

    Without ``alpha`` and ``lost`` the gradients are those of seeds with alpha 1.
    """
    _check("grad", grad, inp, (down, down_bias, up, up_bias), activation, seeds, starts)
    _check_bank(grad, seeds, non_finite=non_finite, fault=fault)
    if alpha is not None:
        _check_bank(grad, seeds, alpha=alpha)
    n_rows, n_seeds, rank = grad.shape[:-1].numel(), len(seeds), up.size(1)
    chunk = up.size(0) // n_seeds
    runs = _Run.all_of(seeds, starts)
    grad, hidden, up = grad.contiguous(), hidden.contiguous(), up.contiguous()
    grad_branch = grad.new_empty(n_seeds, n_rows, chunk)
    _launch_tiles(
        _branch_gradient_kernel,
        (
            grad,
            hidden,
            up,
            up if up_bias is None else up_bias.contiguous(),
            non_finite if alpha is None else alpha,
            non_finite if lost is None else lost,
            grad_branch,
        ),
        grad,
        up,
        runs,
        HAS_BIAS=up_bias is not None,
        HAS_ALPHA=alpha is not None,
        ACTIVATION=activation,
    )
    grad_a = torch.bmm(grad_branch, up.view(n_seeds, chunk, rank))
    a, grad_z = grad.new_empty(n_rows, n_seeds, rank), grad.new_empty(n_rows, n_seeds * rank)
    if a.numel() > 0:
        with torch.cuda.device_of(grad):
            _activate_bwd_kernel[(triton.cdiv(a.numel(), BLOCK_SIZE),)](
                grad_a,
                hidden,
                a,
                grad_z,
                a.numel(),
                n_rows,
                n_seeds,
                rank,
                ACTIVATION=activation,
                BLOCK_SIZE=BLOCK_SIZE,
                COMPUTE=_compute(grad),
            )

    # Not one empty tensor for all: results of an op must not share memory.
    grad_inp, *grads = (grad.new_empty(0) for _ in range(5))
    if needs_inp:
        grad_inp = (grad_z @ down).view(inp.shape)
        _make_finite(grad_inp, [_Run(0, 1, seeds[0], 0, 0, 0)], non_finite, fault)
    if needs_weights:
        grads = [
            grad_z.t() @ inp.reshape(n_rows, inp.size(-1)),
            grads[1] if down_bias is None else grad_z.sum(0),
            torch.bmm(grad_branch.mT, a.transpose(0, 1)).view(up.shape),
            grads[3] if up_bias is None else grad_branch.sum(1).flatten(),
        ]
        for t in grads:
            _make_finite(t, runs, non_finite, fault)
    return grad_inp, *grads


def _make_finite(t: Tensor, runs: list[_Run], non_finite: Tensor, fault: Tensor) -> None:
    size = t.numel() // sum(run.count for run in runs)
    if size == 0:
        return
    with torch.cuda.device_of(t):
        for run in runs:
            _make_finite_kernel[(triton.cdiv(size, BLOCK_SIZE), run.count)](
                t,
                non_finite,
                fault,
                size,
                run.first,
                run.seed,
                run.seed_step,
                BLOCK_SIZE=BLOCK_SIZE,
                COMPUTE=_compute(t),
            )


def _check(
    name: str,
    y: Tensor,
    inp: Tensor,
    weights: Sequence[Tensor | None],
    activation: int,
    seeds: Sequence[int],
    starts: Sequence[int],
) -> None:
    down, down_bias, up, up_bias = weights
    n_seeds = len(seeds)
    if not y.dtype.is_floating_point:
        raise RuntimeError(f"{name} must be float32, float64, float16 or bfloat16, got {y.dtype}")
    if inp.shape[:-1] != y.shape[:-1]:
        raise RuntimeError(
            f"inp must have {name}'s shape {tuple(y.shape)} except at the last dimension, "
            f"got {tuple(inp.shape)}"
        )
    if not 0 <= activation < NUM_ACTIVATIONS:
        raise RuntimeError(f"activation must lie in [0, {NUM_ACTIVATIONS}), got {activation}")
    if n_seeds < 1 or len(starts) != n_seeds:
        raise RuntimeError(
            f"seeds and starts must have one entry per seed, got {n_seeds} and {len(starts)}"
        )
    if up.dim() != 2 or up.size(0) % n_seeds != 0:
        raise RuntimeError(
            f"up must have shape (seeds * chunk, rank) for {n_seeds} seeds, got {tuple(up.shape)}"
        )
    chunk, hidden_size = up.size(0) // n_seeds, n_seeds * up.size(1)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "inp": (inp, tuple(inp.shape)),
        "down": (down, (hidden_size, inp.size(-1))),
        "down_bias": (down_bias, (hidden_size,)),
        "up": (up, tuple(up.shape)),
        "up_bias": (up_bias, (n_seeds * chunk,)),
    }
    for given, (t, shape) in shapes.items():
        if t is not None and (tuple(t.shape), t.dtype, t.device) != (shape, y.dtype, y.device):
            raise RuntimeError(
                f"{given} must have shape {shape} of {y.dtype} on {y.device}, "
                f"got shape {tuple(t.shape)} of {t.dtype} on {t.device}"
            )
    for start in starts:
        if not 0 <= start <= y.size(-1) - chunk:
            raise RuntimeError(
                f"starts must lie in [0, {y.size(-1) - chunk}] for {chunk} channels "
                f"of {y.size(-1)}, got {start}"
            )


def _check_bank(y: Tensor, seeds: Sequence[int], **fields: Tensor) -> None:
    for name, field in fields.items():
        dtype = torch.uint8 if name == "fault" else torch.float32
        if (field.dtype, field.dim(), field.device) != (dtype, 1, y.device):
            raise RuntimeError(
                f"{name} must have shape (num_seeds,) of {dtype} on {y.device}, "
                f"got shape {tuple(field.shape)} of {field.dtype} on {field.device}"
            )
        for seed in seeds:
            if not 0 <= seed < field.numel():
                raise RuntimeError(f"seeds must lie in [0, {field.numel()}) of {name}, got {seed}")
