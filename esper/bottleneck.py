"""The op ``bottleneck``: all seeds of a layer that carry one design, computed and blended at once.

For eager mode. Compilers and exporters are shown the operators of the kernels one by one instead,
see :mod:`esper.kasmina.ensemble`. No call waits for the device.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import esper.native as native
import esper.reference as reference
from esper.ops import guard_grads

if torch.version.cuda is not None and find_spec("triton") is not None:
    from esper.kernels import bottleneck as _triton

    torch.library.impl("esper::bottleneck_", "CUDA")(_triton.bottleneck_)
    torch.library.impl("esper::bottleneck_backward", "CUDA")(_triton.bottleneck_backward)


class RefusedError(RuntimeError):
    """An op refuses its arguments; nothing has been changed."""


class BottleneckWeights(NamedTuple):
    """The weights of S seeds of one layer with rank r and c channels each, stacked along rows."""

    down: Tensor  # (S * r, I)
    down_bias: Tensor | None  # (S * r,)
    up: Tensor  # (S * c, r)
    up_bias: Tensor | None  # (S * c,)


def bottleneck(
    y: Tensor,
    inp: Tensor,
    weights: BottleneckWeights,
    leaves: Sequence[Tensor],
    activation: str,
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    non_finite: Tensor,
    fault: Tensor,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return ``y`` with ``y + alpha * branch`` in each seed's chunk of channels, the last dimension.

    The branch of a seed is ``f(inp @ down.T + down_bias) @ up.T + up_bias`` with its rows of
    ``weights``. ``y`` (..., C) is the host layer's output and ``inp`` (..., I) its input, any float
    dtype, the same as that of the weights. ``activation`` names f, one of ``reference.ACTIVATIONS``.
    Seed s of the S in ``seeds`` has entry ``seeds[s]`` of the layer's slice of the seed bank,
    ``alpha`` f32 in [0, 1], ``non_finite`` f32 and ``fault`` u8, and the channels from ``starts[s]``
    on; chunks do not overlap. Alpha 0 gives ``y`` bit for bit. An element whose ``y + branch`` is
    not finite keeps y's value; unless y's own is non-finite it is counted in the seed's
    ``non_finite``, and its ``fault`` is set.

    Differentiable twice in ``y``, ``inp`` and ``leaves``, which receive the gradients of the
    weights: the rows of each seed, sharing the memory of ``weights``, as down, down_bias, up and
    up_bias of one seed after the other. ``y`` receives the result's gradient itself. The branch
    receives zero for an element of it that is not finite or whose gradient is not, and what is not
    finite of the gradients of the leaves and of ``inp`` becomes 0, counted and flagged for its
    seed, that of ``inp`` for the first. ``alpha`` must keep its value until the backward pass.

    ``in_place`` writes into y's memory, which nobody may have saved for a backward pass. Raises
    ``ValueError`` for an unknown activation or an alpha that asks for a gradient, and
    :class:`RefusedError` for tensors that do not fit, with nothing changed.
    """
    code = activation_code(activation)
    if alpha.requires_grad:
        raise ValueError("alpha must not require a gradient: bottleneck gives none to it")
    call = *weights, code, seeds, starts, alpha, non_finite, fault
    serving = native.serving()
    if serving is not None:
        return cast(Tensor, serving.bottleneck(y, inp, leaves, in_place, *call))
    if torch.is_grad_enabled() and (
        y.requires_grad or any(t.requires_grad for t in (inp, *leaves))
    ):
        apply = _Bottleneck.apply if _transforms_active() else _apply_bottleneck
        return cast(Tensor, apply(y, inp, call, in_place, *leaves))
    result = y if in_place else y.clone()
    _run_bottleneck(result, inp, call)
    return result


def isolated_bottleneck(
    y: Tensor,
    inp: Tensor,
    weights: BottleneckWeights,
    leaves: Sequence[Tensor],
    activation: str,
    seeds: Sequence[int],
    starts: Sequence[int],
    non_finite: Tensor,
    fault: Tensor,
) -> Tensor:
    """Return ``y`` (no copy), passing its gradient on unchanged and to ``leaves`` as well.

    Arguments as for :func:`bottleneck`. The leaves receive the gradients that they would have with
    alpha 1, guarded likewise, but their values reach nothing and ``inp`` receives no gradient.
    Second derivatives with respect to the branch end here: they would reach the host.
    """
    code = activation_code(activation)
    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
        return y
    call = *weights, code, seeds, starts, None, non_finite, fault
    serving = native.serving()
    if serving is not None:
        return cast(Tensor, serving.bottleneck(y, inp, leaves, False, *call))
    apply = _IsolatedBottleneck.apply if _transforms_active() else _apply_isolated
    return cast(Tensor, apply(y, inp.detach(), call, *leaves))


class Bottlenecks:
    """All seeds of one design on one layer, for any number of calls.

    ``places`` tells where down, down_bias, up and up_bias stand among a seed's weights, -1 for
    none. ``stack`` has those of all seeds, and ``addresses`` those of the leaves, which share its
    memory; it is None for one seed. The layer's output has ``channels`` in the last dimension and
    from ``min_rank`` to ``max_rank`` dimensions.
    """

    def __init__(
        self,
        places: Sequence[int],
        stack: Sequence[Tensor] | None,
        addresses: Sequence[int],
        channels: int,
        min_rank: int,
        max_rank: int,
        activation: int,
        seeds: Sequence[int],
        starts: Sequence[int],
        alpha: Tensor,
        non_finite: Tensor,
        fault: Tensor,
    ):
        self._places = places
        self._stack = stack
        self._addresses = addresses
        self._channels = channels
        self._ranks = range(min_rank, max_rank + 1)
        self._activation = tuple(_ACTIVATION_CODES)[activation]
        self._where = (seeds, starts)
        self._alpha = alpha
        self._counters = (non_finite, fault)

    def blend(
        self, host: Tensor, inp: Tensor, leaves: Sequence[Tensor], in_place: bool
    ) -> Tensor | None:
        """Return the layer's output, or None for a call that the op does not compute."""
        if not self._fits(host, inp, leaves):
            return None
        weights, at = self._weights(leaves), (*self._where, self._alpha, *self._counters)
        return bottleneck(host, inp, weights, leaves, self._activation, *at, in_place=in_place)

    def isolate(self, host: Tensor, inp: Tensor, leaves: Sequence[Tensor]) -> Tensor | None:
        """Return ``host``, or None for a call that the op does not compute."""
        if not self._fits(host, inp, leaves):
            return None
        weights, at = self._weights(leaves), (*self._where, *self._counters)
        return isolated_bottleneck(host, inp, weights, leaves, self._activation, *at)

    def _fits(self, host: Tensor, inp: Tensor, leaves: Sequence[Tensor]) -> bool:
        return (
            host.shape[-1] == self._channels
            and host.dim() in self._ranks
            and inp.dtype is host.dtype is leaves[0].dtype
            and not torch.is_autocast_enabled(host.device.type)
            and (len(self._where[0]) == 1 or self._is_stacked(leaves))
        )

    def _is_stacked(self, leaves: Sequence[Tensor]) -> bool:
        return self._stack is not None and self._addresses == [leaf.data_ptr() for leaf in leaves]

    def _weights(self, leaves: Sequence[Tensor]) -> BottleneckWeights:
        stack: Sequence[Any] = leaves if self._stack is None else self._stack
        return BottleneckWeights(*(None if place < 0 else stack[place] for place in self._places))  # type: ignore[arg-type]


def _run_bottleneck(y: Tensor, inp: Tensor, call: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    try:
        hidden, lost = _bottleneck(y, inp, *call)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RefusedError(str(error)) from error
    return hidden, lost


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, inp: Tensor, call: tuple[Any, ...], in_place: bool, *leaves: Tensor
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone()
        hidden, lost = _run_bottleneck(y, inp, call)
        ctx.save_for_backward(inp, hidden, lost, *leaves)
        # The leaves share the memory of the weights, and so the count of its changes.
        ctx.call = call
        ctx.hooked = _hooks_on_saved_tensors(False) is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_inp, *grads = _bottleneck_grads(ctx, grad, ctx.needs_input_grad[4:])
        return grad, grad_inp, None, None, *grads


class _IsolatedBottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, inp: Tensor, call: tuple[Any, ...], *leaves: Tensor) -> Tensor:
        try:
            hidden = F.linear(inp, call[0], call[1])
        except RuntimeError as error:
            raise RefusedError(str(error)) from error
        ctx.save_for_backward(inp, hidden, None, *leaves)
        ctx.call = call
        ctx.hooked = _hooks_on_saved_tensors(False) is not None
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *grads = _bottleneck_grads(ctx, grad.detach(), ctx.needs_input_grad[3:])
        return grad, None, None, *grads


# What Function.apply does before it calls this one serves functorch alone, and takes a microsecond.
_apply_bottleneck: Any = super(torch.autograd.Function, _Bottleneck).apply
_apply_isolated: Any = super(torch.autograd.Function, _IsolatedBottleneck).apply
_hooks_on_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks
_transforms_active = torch._C._are_functorch_transforms_active
_bottleneck = torch.ops.esper.bottleneck_.default
_bottleneck_backward = torch.ops.esper.bottleneck_backward.default
_ACTIVATION_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


def activation_code(activation: str) -> int:
    """Return the number by which the ops know an activation; raises ``ValueError`` for unknown."""
    code = _ACTIVATION_CODES.get(activation)
    if code is None:
        known = ", ".join(_ACTIVATION_CODES)
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    return code


def _bottleneck_grads(ctx: Any, grad: Tensor, needs_leaves: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of inp and of the leaves."""
    needs_inp, needs_weights = ctx.needs_input_grad[1], any(needs_leaves)
    grads: list[Tensor | None] = [None] * (1 + len(needs_leaves))
    if not needs_inp and not needs_weights:
        return grads
    inp, hidden, lost, *leaves = ctx.saved_tensors
    call = ctx.call
    if ctx.hooked:  # the leaves may be copies, of what the weights were in the forward pass
        call = (*_stacked(call[:4], leaves, len(call[5])), *call[4:])
    # Grad mode is on where these gradients will be differentiated again.
    if torch.is_grad_enabled():
        return _differentiable_grads(grad, (inp, *leaves), (needs_inp, *needs_leaves), call)
    stacked = _bottleneck_backward(grad, inp, hidden, lost, *call, needs_inp, needs_weights)
    if needs_inp:
        grads[0] = stacked[0]
    if needs_weights:
        given = [g for g, w in zip(stacked[1:], call[:4], strict=True) if w is not None]
        seeds = call[5]
        parts = given if len(seeds) == 1 else _by_seed(given, len(seeds))
        grads[1:] = [part if need else None for part, need in zip(parts, needs_leaves, strict=True)]
    return grads


def _by_seed(stacked: Sequence[Tensor], num_seeds: int) -> list[Tensor]:
    rows = (t.tensor_split(num_seeds) for t in stacked)
    return [part for parts in zip(*rows, strict=True) for part in parts]


def _differentiable_grads(
    grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], call: tuple[Any, ...]
) -> list[Tensor | None]:
    *weights, code, seeds, starts, alpha, non_finite, fault = call
    inp, *leaves = inputs
    activation = tuple(_ACTIVATION_CODES)[code]
    branches = _branches(inp, weights, leaves, activation, len(seeds))
    weight = grad.new_ones(len(seeds)) if alpha is None else _cells_of(seeds, alpha)
    handed = reference.bottleneck_handed(grad, branches.detach(), starts, weight)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(branches, wanted, handed, create_graph=True))
    # The gradient of inp, which the seeds share, counts as the first one's.
    owners = (seeds[0], *(seed for seed in seeds for _ in range(len(leaves) // len(seeds))))
    return [
        guard_grads([next(grads)], non_finite[seed : seed + 1], fault[seed : seed + 1])[0]
        if need
        else None
        for seed, need in zip(owners, needs, strict=True)
    ]


def _branches(
    inp: Tensor,
    weights: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    activation: str,
    num_seeds: int,
) -> Tensor:
    """Compute the branches from the leaves, so that gradients reach these."""
    down, down_bias, up, up_bias = _stacked(weights, leaves, num_seeds)
    assert down is not None
    assert up is not None
    return reference.bottleneck_branches(inp, down, down_bias, up, up_bias, activation, num_seeds)


def _stacked(
    weights: Sequence[Tensor | None], leaves: Sequence[Tensor], num_seeds: int
) -> list[Tensor | None]:
    """Return what ``weights`` are, made of the leaves."""
    per_seed = len(leaves) // num_seeds
    stacks = iter([torch.cat([*leaves[kind::per_seed]]) for kind in range(per_seed)])
    return [None if weight is None else next(stacks) for weight in weights]


def _cells_of(seeds: Sequence[int], field: Tensor) -> Tensor:
    # Indexing with a list would copy it to the device and wait for it.
    return torch.stack([field[seed] for seed in seeds])


# The faster of the two that do the same.
group: type[Bottlenecks] = Bottlenecks
if native.autograd is not None:
    native.autograd.connect(_differentiable_grads, RefusedError)
    group = native.autograd.Bottlenecks


@torch.library.register_fake("esper::bottleneck_")
def _(
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
    hidden = inp.new_empty(*inp.shape[:-1], down.size(0))
    return hidden, inp.new_empty(1, dtype=torch.int32)


@torch.library.register_fake("esper::bottleneck_backward")
def _(
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
    grad_inp = inp.new_empty(inp.shape if needs_inp else 0)
    weights = (down, down_bias, up, up_bias)
    given = (needs_weights and w is not None for w in weights)
    return grad_inp, *(
        inp.new_empty(w.shape if is_given and w is not None else 0)
        for w, is_given in zip(weights, given, strict=True)
    )
