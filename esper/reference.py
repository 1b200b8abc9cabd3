"""Plain PyTorch specification of every op: what the native kernels must compute.

Written to be obviously right, not fast. :func:`blend` is also what compilers and exporters see,
so it is functional and differentiable.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.contracts import RampCurve, SeedState

SIGMOID_STEEPNESS = 12.0

# The ops take an activation by its place in this order.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are combined: float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def lerp(y: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    """Interpolate from the nearer end: exact where ``out == y``, finite wherever both ends are."""
    rest = 1 - weight
    from_y = y + (weight * out - weight * y)
    from_out = out - (rest * out - rest * y)
    return torch.where(weight < 0.5, from_y, from_out)


def blend(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
) -> Tensor:
    """Return ``y`` with ``y + alpha[seed] * (out - y)`` in the chunk of channels of each ``out``.

    ``outs[i]`` covers channels ``[starts[i], starts[i] + outs[i].size(channel_dim))`` and belongs
    to ``seeds[i]``. A non-finite element of ``out`` counts as equal to ``y``'s. Differentiable in
    ``y`` and ``outs`` everywhere, in ``alpha`` for ``0 < alpha < 1`` (at the ends the value is a
    copy).
    """
    result = y
    for out, seed, start in zip(outs, seeds, starts, strict=True):
        size = out.size(channel_dim)
        act = y.narrow(channel_dim, start, size)
        mixed = blend_chunk(act, out, alpha[seed])
        result = result.slice_scatter(mixed, channel_dim, start, start + size)
    return result


def blend_chunk(act: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    """Return ``act + weight * (out - act)``; a non-finite ``out`` counts as equal to ``act``."""
    # Selecting before the arithmetic as well keeps NaN out of the gradients.
    usable = torch.where(out.isfinite(), out, act)
    wide = compute_dtype(act.dtype)
    mixed = lerp(act.to(wide), usable.to(wide), weight.to(wide)).to(act.dtype)
    return torch.where(weight == 0, act, torch.where(weight == 1, usable, mixed))


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
    ``grad`` reaches ``y`` alone: it was none of the seed's making. Differentiable itself.
    """
    grad_y, grad_outs, grad_alphas = grad, [], {}
    for out, seed, start in zip(outs, seeds, starts, strict=True):
        size = out.size(channel_dim)
        chunk = grad.narrow(channel_dim, start, size)
        grad_act, grad_out = blend_chunk_backward(chunk, out, alpha[seed])
        grad_y = grad_y.slice_scatter(grad_act, channel_dim, start, start + size)
        grad_outs.append(grad_out)
        if y is not None:
            act = y.narrow(channel_dim, start, size)
            grad_alphas[seed] = blend_chunk_slope(chunk, act, out)
    grads = [g for g, wanted in zip((grad_y, *grad_outs), needed, strict=True) if wanted]
    if y is not None:
        grads.append(by_seed(grad_alphas, alpha))
    return grads


def blend_chunk_backward(grad: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`blend_chunk` with respect to ``act`` and ``out``."""
    wide = compute_dtype(grad.dtype)
    usable = out.isfinite()
    # Factors are selected, not products: what is masked stays out of the second derivatives too.
    weight = torch.where(usable, weight.to(wide), 0)
    handed = torch.where(usable & grad.isfinite(), grad.to(wide), 0)
    return (grad.to(wide) * (1 - weight)).to(grad.dtype), (handed * weight).to(out.dtype)


def blend_chunk_slope(grad: Tensor, act: Tensor, out: Tensor) -> Tensor:
    """Return the gradient of :func:`blend_chunk` with respect to ``weight``, float64 ()."""
    sound = out.isfinite() & grad.isfinite()
    handed = torch.where(sound, grad.double(), 0)
    return (handed * torch.where(sound, out.double() - act.double(), 0)).sum()


def by_seed(values: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """Return the scalars in one tensor ``like`` a field of the seeds, 0 where there is none."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.stack([values.get(seed, zero).to(like.dtype) for seed in range(len(like))])


def blend_lost(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    channel_dim: int,
    like: Tensor,
) -> Tensor:
    """Return how many elements of each seed's ``out`` are non-finite where ``y``'s own are finite.

    The result has the shape and dtype of ``like``, a field of the seeds such as alpha.
    """
    lost = {}
    for out, seed, start in zip(outs, seeds, starts, strict=True):
        act = y.narrow(channel_dim, start, out.size(channel_dim))
        lost[seed] = (~out.isfinite() & act.isfinite()).sum()
    return by_seed(lost, like)


def record_lost(lost: Tensor, non_finite: Tensor, fault: Tensor) -> None:
    """Book ``lost`` elements, f32 (num_seeds,), on the seeds that the two fields belong to."""
    non_finite.add_(lost)
    fault.copy_(torch.where(lost > 0, torch.ones_like(fault), fault))


def finite(t: Tensor) -> Tensor:
    """Return ``t`` with its non-finite elements set to zero."""
    return t.nan_to_num(0.0, 0.0, 0.0)


def guard_grads(grads: Sequence[Tensor], non_finite: Tensor, fault: Tensor) -> list[Tensor]:
    """Return each gradient with its non-finite elements set to zero, counted and flagged.

    Differentiable; the second derivative of a replaced element is zero.
    """
    lost = torch.zeros_like(non_finite)
    for grad in grads:
        lost = lost + (~grad.isfinite()).sum()
    record_lost(lost, non_finite, fault)
    return [torch.where(grad.isfinite(), grad, 0) for grad in grads]


def seed_chunks(t: Tensor, channel_dim: int, num_seeds: int) -> tuple[Tensor, ...]:
    """Divide the channels among the seeds, contiguously and evenly, longer chunks first."""
    return t.tensor_split(num_seeds, channel_dim)


def observe(y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int) -> None:
    """Merge the statistics of each seed's chunk of ``y`` into its column of ``health``.

    The merge is Chan, Golub, LeVeque (1979), equations 2.1a and 2.1b.
    """
    if y.numel() == 0:
        return
    for seed, chunk in enumerate(seed_chunks(y.double(), channel_dim, num_seeds), first_seed):
        column = health[:, seed]
        count, mean, m2 = column[:3].double()
        finite = chunk[chunk.isfinite()]
        if finite.numel() > 0:
            total = count + finite.numel()
            delta = finite.mean() - mean
            m2 = m2 + (finite - finite.mean()).square().sum()
            m2 = m2 + delta.square() * count * finite.numel() / total
            mean = mean + delta * finite.numel() / total
            count = total
        zero = (chunk == 0).movedim(channel_dim, 0).reshape(chunk.size(channel_dim), -1).all(1)
        dead = zero.sum() * (chunk.numel() // chunk.size(channel_dim))
        non_finite = chunk.numel() - finite.numel()
        column[:5] = saturate(
            torch.stack([count, mean, m2, column[3] + dead, column[4] + non_finite])
        )


def observe_grad(
    grad: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> None:
    """Add the sum of squares of each seed's chunk of ``grad`` to row 5 of ``health``."""
    for seed, chunk in enumerate(seed_chunks(grad.double(), channel_dim, num_seeds), first_seed):
        energy = chunk[chunk.isfinite()].square().sum()
        health[5, seed] = saturate(health[5, seed].double() + energy)


def relu_observe(
    x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    """Return ``relu(x)`` and merge its statistics into ``health``."""
    y = x.relu()
    observe(y.detach(), channel_dim, health, first_seed, num_seeds)
    return y


def relu_observe_grad(
    grad: Tensor, y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    """Return the gradient that ``relu``, whose result is ``y``, hands on, and observe ``grad``.

    Differentiable as PyTorch's own is.
    """
    observe_grad(grad.detach(), channel_dim, health, first_seed, num_seeds)
    result: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
    return result


def saturate(value: Tensor) -> Tensor:
    """Return ``value`` as float32, the largest finite number in place of infinity."""
    limit = torch.finfo(torch.float32).max
    return value.clamp(-limit, limit).float()


def ramp(curve: RampCurve, progress: Tensor) -> Tensor:
    """Map progress in [0, 1] to [0, 1] along ``curve``, hitting both ends exactly."""
    match curve:
        case RampCurve.LINEAR:
            return progress
        case RampCurve.COSINE:
            return (1 - torch.cos(torch.pi * progress)) / 2
        case RampCurve.SIGMOID:
            low, here, high = (
                torch.sigmoid(SIGMOID_STEEPNESS * (p - 0.5))
                for p in (torch.zeros_like(progress), progress, torch.ones_like(progress))
            )
            return (here - low) / (high - low)


def tick(seeds: Mapping[str, Tensor], max_errors: int) -> None:
    """Advance all seeds by one step; ``seeds`` maps each field of the bank to its tensor."""
    states = seeds["lifecycle_states"]
    running = (states >= SeedState.TRAINING) & (states <= SeedState.FOSSILIZED)
    faulty = running & (seeds["fault"] != 0)
    seeds["error_count"] += faulty
    seeds["fault"][faulty] = 0
    seeds["fallback_active"][faulty & (seeds["error_count"] >= max_errors)] = 1

    quarantined = running & (seeds["fallback_active"] != 0)
    slope = seeds["alpha_slope"]
    ramping = running & ~quarantined & (slope != 0)
    progress = seeds["ramp_progress"] + slope
    # n steps of 1/n may round to just below 1 and have arrived all the same.
    progress = torch.where(progress > 1 - slope / 16, 1.0, progress)
    curves = torch.stack([ramp(curve, progress) for curve in RampCurve])
    fraction = curves.gather(0, seeds["ramp_curve"].long()[None])[0]
    target = seeds["alpha_target"]
    alpha = torch.where(progress == 1, target, target * fraction)
    seeds["ramp_progress"][ramping] = progress[ramping]
    seeds["alpha_blend"][ramping] = alpha[ramping]
    seeds["alpha_blend"][quarantined] = 0
    seeds["alpha_slope"][quarantined | (ramping & (progress == 1))] = 0


def bottleneck_branches(
    inp: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    num_seeds: int,
) -> Tensor:
    """Return ``f(inp @ down.T + down_bias) @ up.T + up_bias`` of each seed, (..., num_seeds, c)."""
    a = ACTIVATIONS[activation](F.linear(inp, down, down_bias)).unflatten(-1, (num_seeds, -1))
    ups = up.unflatten(0, (num_seeds, -1))
    branches = torch.einsum("...sr,scr->...sc", a, ups)
    return branches if up_bias is None else branches + up_bias.unflatten(0, (num_seeds, -1))


def bottleneck(y: Tensor, branches: Tensor, starts: Sequence[int], alpha: Tensor) -> Tensor:
    """Return ``y`` with ``y + alpha[s] * branches[..., s, :]`` at channels from ``starts[s]`` on.

    Where ``y + branch`` is not finite the element keeps ``y``'s value. Differentiable in ``y``,
    whose gradient is the result's own, and in ``branches``.
    """
    wide = compute_dtype(y.dtype)
    size = branches.size(-1)
    for s, start in enumerate(starts):
        act, branch = y.narrow(-1, start, size).to(wide), branches[..., s, :].to(wide)
        moves = (act + branch).to(y.dtype).isfinite() & (alpha[s] != 0)
        # Selecting before the sum keeps NaN out of the gradients, and after it the host's zeros.
        moved = act + torch.where(moves, alpha[s].to(wide) * branch, 0)
        exact = torch.where(moves, moved, act).to(y.dtype)
        y = y.slice_scatter(exact, -1, start, start + size)
    return y


def bottleneck_handed(
    grad: Tensor, branches: Tensor, starts: Sequence[int], alpha: Tensor
) -> Tensor:
    """Return the gradient that the branches receive: ``alpha[s] * grad``, like ``branches``.

    It is zero where ``grad`` or the branch is not finite. Differentiable in ``grad``.
    """
    size = branches.size(-1)
    chunks = torch.stack([grad.narrow(-1, start, size) for start in starts], -2)
    sound = chunks.isfinite() & branches.isfinite()
    wide = compute_dtype(grad.dtype)
    handed = alpha.to(wide)[:, None] * torch.where(sound, chunks, 0).to(wide)
    return handed.to(grad.dtype)
