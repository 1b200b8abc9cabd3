"""Seeds side by side in the channels of one tensor, guarded as if each were alone.

For eager mode; the ops here are PyTorch's own. No call waits for a CUDA device.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import esper.reference as reference
from esper.ops import guard_grads

# oneDNN computes up to 16 channels at once, and groups of less than 8 no faster than one of 8.
_CHANNELS_AT_ONCE, _FEWEST_CHANNELS = 16, 8

# For each seed, in their order along the channels, its cells ``non_finite`` and ``fault``.
Counters = Sequence[tuple[Tensor, Tensor]]


class Geometry(NamedTuple):
    """How a convolution moves over the positions; one number a spatial dimension."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def stack_weights(leaves: Sequence[Tensor], counters: Counters) -> tuple[Tensor, ...]:
    """Return each kind of weight stacked along its rows over the seeds.

    ``leaves`` are the weights of one seed after the other, the same kinds of the same shapes for
    each. They receive the gradients of their rows, non-finite elements zeroed and charged to their
    seed. Differentiable twice.
    """
    if not torch.is_grad_enabled():
        return _stacked(leaves, len(counters))
    return cast(tuple[Tensor, ...], _StackWeights.apply(counters, *leaves))


def guard_chunks(x: Tensor, counters: Counters) -> Tensor:
    """Return ``x`` (no copy), whose channels, dimension 1, are the seeds' in equal chunks.

    A non-finite element of its gradient becomes 0 and is charged to the seed whose chunk it is in.
    """
    if not torch.is_grad_enabled() or not x.requires_grad:
        return x
    return cast(Tensor, _GuardChunks.apply(x, counters))


def shared_convolution(
    inp: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, counters: Counters
) -> Tensor:
    """Convolve ``inp`` (N, I, ...), which the seeds share, by the stacked weights of all seeds.

    ``weight`` is (S * r, I, ...) and ``bias`` (S * r,) or None. The gradient of ``inp`` is the sum
    of what each seed sends back, in which a seed's non-finite elements are zeroed and charged to it
    alone; where the sum overflows it is zero, charged to the first. Differentiable twice.
    """
    if not torch.is_grad_enabled() or not inp.requires_grad:
        return _convolve(inp, weight, bias, geometry)
    return cast(Tensor, _SharedConvolution.apply(inp, weight, bias, geometry, counters))


def grouped_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """Convolve each of the ``groups`` of x's channels, dimension 1, by its rows of ``weight``.

    As ``torch.convolution`` does, and differentiable as often. On a CPU narrow groups take their
    gradients together, by a block-diagonal weight, which oneDNN computes faster.
    """
    if not torch.is_grad_enabled():
        return _convolve(x, weight, bias, geometry, groups)
    return cast(Tensor, _GroupedConvolution.apply(x, weight, bias, geometry, groups))


def isolated_convolution(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    start: int,
) -> Tensor:
    """Return ``y`` (no copy), passing its gradient on unchanged and to the convolution of ``x``.

    The convolution is not computed: its gradients are those that it would have if its result had
    been y's channels (dimension 1) from ``start`` on, of a gradient with non-finite elements set to
    zero. Raises ``RuntimeError`` for an ``x`` whose convolution would not fit there. Second
    derivatives end here: they would reach the host.
    """
    expected = (len(y), len(weight), *y.shape[2:])
    shape = _convolved_shape(x, weight, geometry)
    if shape != expected or x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(f"expected a convolution of shape {expected}, got {shape}")
    return cast(Tensor, _IsolatedConvolution.apply(y, x, weight, bias, geometry, groups, start))


def _convolved_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    spatial = zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    return (
        len(x),
        len(weight),
        *(
            (size + 2 * padding - dilation * (width - 1) - 1) // stride + 1
            for size, width, stride, padding, dilation in spatial
        ),
    )


class _GroupedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups = geometry, groups
        return _convolve(x, weight, bias, geometry, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        # By way of its zeros a number that is not finite would reach the other groups.
        if not _are_narrow(x, weight) or not _is_known_to_be_finite(grad):
            return *_gradients(ctx, grad, x, weight, wanted, ctx.groups), None, None
        blocks = weight.new_zeros(len(weight), x.shape[1], *weight.shape[2:])
        _diagonal(blocks, weight.shape, ctx.groups).copy_(weight.unflatten(0, (ctx.groups, -1)))
        grad_x, grad_weight, grad_bias = _gradients(ctx, grad, x, blocks, wanted)
        if grad_weight is not None:
            grad_weight = _diagonal(grad_weight, weight.shape, ctx.groups).reshape(weight.shape)
        return grad_x, grad_weight, grad_bias, None, None


def _are_narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether the groups take less time as one; pointwise ones do not make up for the rearranging.

    For groups of a single channel oneDNN has loops of their own.
    """
    channels = weight.shape[1]
    return (
        x.is_cpu
        and 1 < channels < min(x.shape[1], _FEWEST_CHANNELS)
        and x.shape[1] <= _CHANNELS_AT_ONCE
        and weight.shape[2:].numel() > 1
    )


def _diagonal(blocks: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Return a view (S, r, i, ...) of the blocks on the diagonal of (S * r, S * i, ...).

    ``shape`` is that of the blocks below one another, (S * r, i, ...).
    """
    rows, channels, *kernel = shape
    row, channel, *rest = blocks.stride()
    own = (rows // groups, channels, *kernel)
    down = own[0] * row + channels * channel
    return blocks.as_strided((groups, *own), (down, row, channel, *rest))


class _IsolatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        groups: int,
        start: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups, ctx.start = geometry, groups, start
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        chunk = reference.finite(grad.detach().narrow(1, ctx.start, len(weight)))
        needs = ctx.needs_input_grad[1:4]
        own = _gradients(ctx, chunk, x, weight, needs, ctx.groups) if any(needs) else [None] * 3
        return grad, *own, None, None, None


class _StackWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counters: Counters, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.counters = counters
        ctx.set_materialize_grads(False)
        return _stacked(leaves, len(counters))

    @staticmethod
    def backward(ctx: Any, *stacked: Tensor | None) -> tuple[Tensor | None, ...]:
        num_seeds = len(ctx.counters)
        kinds = [None if grad is None else grad.tensor_split(num_seeds) for grad in stacked]
        rows = [
            None if kind is None else kind[place] for place in range(num_seeds) for kind in kinds
        ]
        needs = ctx.needs_input_grad[1:]
        grads = [grad if need else None for grad, need in zip(rows, needs, strict=True)]
        result: list[Tensor | None] = []
        for place in range(num_seeds):
            own = grads[place * len(kinds) : (place + 1) * len(kinds)]
            clean = iter(
                guard_grads([grad for grad in own if grad is not None], *ctx.counters[place])
            )
            result += [None if grad is None else next(clean) for grad in own]
        return None, *result


def _stacked(leaves: Sequence[Tensor], num_seeds: int) -> tuple[Tensor, ...]:
    kinds = len(leaves) // num_seeds
    return tuple(torch.cat([*leaves[kind::kinds]]) for kind in range(kinds))


class _GuardChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counters: Counters) -> Tensor:
        ctx.counters = counters
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if _is_known_to_be_finite(grad):
            return grad, None
        chunks = grad.tensor_split(len(ctx.counters), 1)
        clean = [
            guard_grads([chunk], *cells)[0]
            for chunk, cells in zip(chunks, ctx.counters, strict=True)
        ]
        return torch.cat(clean, 1), None


class _SharedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inp: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        counters: Counters,
    ) -> Tensor:
        ctx.save_for_backward(inp, weight)
        ctx.geometry, ctx.counters = geometry, counters
        return _convolve(inp, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        needs_inp, *needs_weights = ctx.needs_input_grad[:3]
        # Where a look at the sum shows that no seed needs its guard, the sum is all that is computed.
        summed = needs_inp and _may_look_at(grad)
        grads = _gradients(ctx, grad, inp, weight, (summed, *needs_weights))
        grad_inp = grads[0]
        if needs_inp and (grad_inp is None or not _is_known_to_be_finite(grad_inp)):
            grad_inp = _guarded_sum(ctx, grad, inp, weight)
        return grad_inp, grads[1], grads[2], None, None


def _guarded_sum(ctx: Any, grad: Tensor, inp: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``inp``, computed seed by seed."""
    num_seeds = len(ctx.counters)
    total: Tensor | None = None
    pairs = zip(grad.tensor_split(num_seeds, 1), weight.tensor_split(num_seeds), strict=True)
    for place, (part, rows) in enumerate(pairs):
        own = _gradients(ctx, part, inp, rows, (True, False, False))[0]
        assert own is not None
        [clean] = guard_grads([own], *ctx.counters[place])
        total = clean if total is None else total + clean
    assert total is not None
    # Finite parts may have a sum that is not, for which the first seed answers as in `bottleneck`.
    return guard_grads([total], *ctx.counters[0])[0] if num_seeds > 1 else total


def _convolve(
    inp: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int = 1
) -> Tensor:
    no_output_padding = (0,) * len(geometry.stride)
    return torch.convolution(inp, weight, bias, *geometry, False, no_output_padding, groups)


def _gradients(
    ctx: Any,
    grad: Tensor,
    inp: Tensor,
    weight: Tensor,
    wanted: Sequence[bool],
    groups: int = 1,
) -> list[Tensor | None]:
    """Return the gradients of inp, weight and bias; they can be differentiated again."""
    if not any(wanted):
        return [None, None, None]
    no_output_padding = (0,) * len(ctx.geometry.stride)
    grads = torch.ops.aten.convolution_backward.default(
        grad, inp, weight, [len(weight)], *ctx.geometry, False, no_output_padding, groups, wanted
    )
    return [given if want else None for given, want in zip(grads, wanted, strict=True)]


def _may_look_at(grad: Tensor) -> bool:
    """Whether Python may decide by its values: those on a CUDA device would have to be waited for.

    Neither in a backward pass that will be differentiated, where the guards have to be seen.
    """
    return grad.is_cpu and not torch.is_grad_enabled()


def _is_known_to_be_finite(x: Tensor) -> bool:
    # A sum is faster than a look at each element; where it overflows, the guards look at them.
    return _may_look_at(x) and math.isfinite(x.sum().item())
