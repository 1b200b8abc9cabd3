"""The ops: native kernels with fake kernels and gradients, under one Python signature each.

No op ever waits for the device. Wrong dtypes, devices and shapes raise ``RuntimeError`` that names
the tensor, its value and the expectation. A *cell* is a one-element view of the seed bank's arena:
one field of one seed, read and written on the device alone.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import esper.native as native
import esper.reference as reference

_LIBRARY = Path(__file__).with_name("_ops.so")

if not _LIBRARY.exists():
    raise ImportError(
        f"Esper's native ops are not built: {_LIBRARY} is missing; "
        "in a checkout run `make setup`, or `pip install --no-build-isolation -e .`"
    )
torch.ops.load_library(_LIBRARY)

# They return nothing to differentiate, so autograd need not look at what they are given.
_AUTOGRAD = torch.library.Library("esper", "IMPL", "Autograd")
for _op in ("observe", "observe_grad"):
    _AUTOGRAD.impl(_op, torch.library.fallthrough_kernel)

if torch.version.cuda is not None and find_spec("triton") is not None:
    from esper.kernels import blend as _triton

    torch.library.impl("esper::blend", "CUDA")(_triton.blend)
    torch.library.impl("esper::blend_", "CUDA")(_triton.blend_)
    torch.library.impl("esper::blend_backward", "CUDA")(_triton.blend_backward)


def is_exporting() -> bool:
    """Whether what runs is being recorded, to be run where Esper is not."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def tick(arena: Tensor, num_seeds: int, max_errors: int) -> None:
    """Advance every running seed by one step: book its fault, quarantine it, or move its ramp.

    ``arena`` is the seed bank's block, u8 (64 * capacity,), changed in place. A seed in TRAINING to
    FOSSILIZED with a fault gets one more error, and from ``max_errors`` on ``fallback_active``;
    then its alpha is 0 for good. Otherwise a seed with a slope moves along its curve, and its alpha
    is ``alpha_target`` exactly once the ramp has arrived.
    """
    torch.ops.esper.tick(arena, num_seeds, max_errors)


def observe(y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int) -> None:
    """Merge the statistics of one batch into the health of a layer's seeds.

    ``y`` is the host layer's output, any float dtype, its channels divided among the seeds;
    ``health`` is f32 (6, capacity), of which columns ``first_seed`` to ``first_seed + num_seeds``
    are changed in place: count, mean and M2 of the finite elements, the number of elements in
    channels that are zero throughout, and the number of non-finite elements.
    """
    torch.ops.esper.observe(y, channel_dim, health, first_seed, num_seeds)


def observe_grad(
    grad: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> None:
    """Add the sum of squares of the finite elements of each seed's chunk of ``grad`` to its health.

    Arguments as for :func:`observe`; row 5 of ``health`` is changed in place.
    """
    torch.ops.esper.observe_grad(grad, channel_dim, health, first_seed, num_seeds)


def observe_both_passes(
    y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> None:
    """:func:`observe` ``y``, and in its backward pass the gradient that it receives."""
    place = (channel_dim, health, first_seed, num_seeds)
    serving = native.serving()
    if serving is not None:
        serving.observe_both_passes(y, *place)
        return
    observe(y, *place)
    if y.requires_grad:
        y.register_hook(lambda grad: observe_grad(grad, *place) if grad is not None else None)


def relu_observe(
    x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    """Return ``relu(x)``, and merge its statistics as :func:`observe` does, in one pass.

    The result has the values and the strides that ``torch.relu`` gives; a NaN stays NaN. One pass
    where ``x`` is contiguous or has its channels last in memory; other layouts are read once more.
    No gradient flows back; see :func:`observed_relu`.
    """
    result: Tensor = torch.ops.esper.relu_observe(
        x.detach(), channel_dim, health, first_seed, num_seeds
    )
    return result


def relu_observe_grad(
    grad: Tensor, y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    """Return ``grad`` where ``y``, the result of ``relu``, is positive or NaN, and 0 elsewhere.

    Adds the energy of ``grad`` as :func:`observe_grad` does, in the same pass.
    """
    result: Tensor = torch.ops.esper.relu_observe_grad(
        grad.detach(), y.detach(), channel_dim, health, first_seed, num_seeds
    )
    return result


def observed_relu(
    x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    """Return ``relu(x)`` while observing it and, in the backward pass, the gradient it receives.

    Values and gradients are those of ``torch.relu``; ``health`` is changed as by :func:`observe`
    and :func:`observe_grad`, without a pass of their own. The gradients are differentiable.

    Only ReLU is fused so. Its arithmetic is exact, so that the host gets PyTorch's bits; a second
    implementation of GELU and the like could differ from PyTorch's in the last one, so they are
    observed by one extra read.
    """
    place = (channel_dim, health, first_seed, num_seeds)
    if torch.compiler.is_compiling():
        y = x.relu()
        observe(y, *place)
        return y
    serving = native.serving()
    if serving is not None:
        return cast(Tensor, serving.observed_relu(x, *place))
    return cast(Tensor, _ObservedRelu.apply(x, *place))


def blend(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return ``y`` with ``y + alpha[seed] * (out - y)`` in the chunk of channels of each seed.

    ``y`` is the host layer's output, any float dtype; each of ``outs`` is a kernel's, of the same
    dtype and of y's shape except at ``channel_dim``. ``outs[i]`` belongs to ``seeds[i]``, each seed
    named once, and covers channels ``[starts[i], starts[i] + outs[i].size(channel_dim))``; these
    chunks lie apart from one another, in any order, and may leave channels as they are. ``alpha``
    f32, ``non_finite`` f32 and ``fault`` u8 are the layer's slice of the seed bank, each
    (num_seeds,). An alpha, in [0, 1], of 0 gives ``y`` bit for bit, 1 gives ``out``. A non-finite
    element of ``out`` takes y's value; unless y's is non-finite too it is counted in the seed's
    ``non_finite`` and its ``fault`` is set.

    The result has y's memory layout if that is contiguous or has the channels last, and is
    contiguous otherwise. With ``in_place`` it is ``y`` itself, which must be saved for nobody's
    backward pass; that is refused with ``ValueError`` where ``alpha`` requires a gradient, or
    where ``y`` is a leaf that does.

    Differentiable in ``y``, ``outs`` and ``alpha``, and its gradients are too; ``alpha`` must keep
    its value until the backward pass. A non-finite element of the incoming gradient reaches ``y``
    alone, so that no seed is blamed for it. Compilers see the reference, so that they may fuse it;
    exporters too, without the counters.
    """
    if in_place:
        _check_in_place(y, alpha)
    if torch.compiler.is_compiling() or is_exporting():
        result = _compiled_blend(y, outs, seeds, starts, alpha, channel_dim, non_finite, fault)
        return y.copy_(result) if in_place else result
    if in_place:
        # What lies in y's memory would be read after it was overwritten.
        outs = [out.clone() if _share_memory(out, y) else out for out in outs]
    chunks = _Chunks(seeds, starts, alpha, channel_dim, non_finite, fault)
    if torch.is_grad_enabled():
        return cast(Tensor, _Blend.apply(y, alpha, chunks, in_place, *outs))
    # Without an autograd.Function: it would take longer than the blending of a small tensor.
    return _blend_in_place(y, outs, chunks) if in_place else _blend(y, outs, chunks)


def _check_in_place(y: Tensor, alpha: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    if alpha.requires_grad:
        raise ValueError("blend in place keeps no y for alpha's gradient, but alpha requires one")
    if y.requires_grad and y.is_leaf:
        raise ValueError("blend in place needs a y that is no leaf, but y is one and requires grad")


def isolate(y: Tensor, out: Tensor, channel_dim: int, start: int) -> Tensor:
    """Return ``y`` (no copy), passing its gradient on to ``y`` unchanged and to ``out`` as well.

    ``out`` receives the gradient of channels ``[start, start + out.size)``, as if it had been the
    output there and with non-finite elements set to zero, but its values reach nothing. Second
    derivatives with respect to ``out`` end here: they would reach the host.
    """
    if is_exporting():
        return y
    return cast(Tensor, _Isolate.apply(y, out, channel_dim, start))


def guard(non_finite: Tensor, fault: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors`` (no copy) such that only finite gradients flow back through them.

    In the backward pass a non-finite element of a gradient becomes 0, is counted in the f32 cell
    ``non_finite``, and sets the u8 cell ``fault``. Tensors that need no gradient pass untouched.
    The gradients are differentiable; what a second backward pass hands to them is made finite.
    """
    guarded = [t for t in tensors if t.requires_grad]
    if not guarded or not torch.is_grad_enabled() or is_exporting():
        return tensors
    clean = iter(_Guard.apply(non_finite, fault, *guarded))
    return tuple(next(clean) if t.requires_grad else t for t in tensors)


def _compiled_blend(
    y: Tensor,
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
) -> Tensor:
    if not is_exporting():
        detached = [out.detach() for out in outs]
        lost = reference.blend_lost(y.detach(), detached, seeds, starts, channel_dim, non_finite)
        reference.record_lost(lost, non_finite, fault)
        outs = [_FiniteGrad.apply(out) for out in outs]
    return reference.blend(y, outs, seeds, starts, alpha, channel_dim)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _Chunks(NamedTuple):
    """Which seed blends where: what an op takes besides ``y`` and ``outs``."""

    seeds: Sequence[int]
    starts: Sequence[int]
    # Not a saved tensor: alpha shares its version counter with the whole arena, where other
    # cells change between forward and backward.
    alpha: Tensor
    channel_dim: int
    non_finite: Tensor
    fault: Tensor

    def guard(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Blame each seed for what its kernel does to its gradient in a second backward pass."""
        guarded: list[Tensor | None] = []
        for seed, grad in zip(self.seeds, grads, strict=True):
            cells = (field.narrow(0, seed, 1) for field in (self.non_finite, self.fault))
            guarded.append(None if grad is None else guard(*cells, grad)[0])
        return guarded


def _blend(y: Tensor, outs: Sequence[Tensor], chunks: _Chunks) -> Tensor:
    result: Tensor = torch.ops.esper.blend.default(y, outs, *chunks)
    return result


def _blend_in_place(y: Tensor, outs: Sequence[Tensor], chunks: _Chunks) -> Tensor:
    torch.ops.esper.blend_.default(y, outs, *chunks)
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y


class _ObservedRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
    ) -> Tensor:
        # Not a saved tensor: health shares its version counter with the whole arena, where other
        # fields change between forward and backward.
        ctx.place = (channel_dim, health, first_seed, num_seeds)
        y: Tensor = torch.ops.esper.relu_observe(x, *ctx.place)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            observe_grad(grad, *ctx.place)
            return torch.ops.aten.threshold_backward(grad, y, 0), None, None, None, None
        return torch.ops.esper.relu_observe_grad(grad, y, *ctx.place), None, None, None, None


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, alpha: Tensor, chunks: _Chunks, in_place: bool, *outs: Tensor
    ) -> Tensor:
        needs_alpha = ctx.needs_input_grad[1]
        ctx.save_for_backward(y if needs_alpha else None, *outs)
        ctx.chunks = chunks
        if not in_place:
            return _blend(y, outs, chunks)
        torch.ops.esper.blend_.default(y, outs, *chunks)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *outs = ctx.saved_tensors
        needs_y, needs_alpha, _, _, *needs_outs = ctx.needs_input_grad
        needed = [needs_y, *needs_outs]
        seeds, starts, alpha, channel_dim, *_ = chunks = ctx.chunks
        # Grad mode is on where these gradients will be differentiated again.
        differentiable = torch.is_grad_enabled()
        place = reference if differentiable else torch.ops.esper
        grads = iter(place.blend_backward(grad, y, outs, seeds, starts, alpha, channel_dim, needed))
        grad_y, *grad_outs = (next(grads) if wanted else None for wanted in needed)
        if differentiable:
            # A second backward pass leaves the kernel by the way that this one enters it.
            grad_outs = chunks.guard(grad_outs)
        return grad_y, next(grads) if needs_alpha else None, None, None, *grad_outs


class _Isolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, out: Tensor, channel_dim: int, start: int) -> Tensor:
        ctx.channel_dim, ctx.start, ctx.size = channel_dim, start, out.size(channel_dim)
        # An input returned as it is would become a view that refuses in-place ops such as the
        # host's nn.ReLU(inplace=True).
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chunk = grad.narrow(ctx.channel_dim, ctx.start, ctx.size)
        return grad, reference.finite(chunk.detach()), None, None


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, non_finite: Tensor, fault: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.cells = non_finite, fault
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [grad for grad in grads if grad is not None]
        clean = iter(guard_grads(present, *ctx.cells))
        return None, None, *(None if grad is None else next(clean) for grad in grads)


def guard_grads(grads: list[Tensor], non_finite: Tensor, fault: Tensor) -> list[Tensor]:
    """Return each of ``grads`` with 0 for what is not finite, counted and flagged as by ``guard``."""
    if torch.compiler.is_compiling():
        return reference.guard_grads(grads, non_finite, fault)
    if torch.is_grad_enabled():
        clean = reference.guard_grads(grads, non_finite, fault)
        return [_FiniteGrad.apply(grad) for grad in clean]
    result: list[Tensor] = torch.ops.esper.guard_grads(grads, non_finite, fault)
    return result


class _FiniteGrad(torch.autograd.Function):
    """Passes a tensor on as it is, and its gradient with non-finite elements set to zero."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reference.finite(grad)


@torch.library.register_fake("esper::tick")
def _(arena: Tensor, num_seeds: int, max_errors: int) -> None:
    return None


@torch.library.register_fake("esper::observe")
def _(y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int) -> None:
    return None


@torch.library.register_fake("esper::observe_grad")
def _(grad: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int) -> None:
    return None


@torch.library.register_fake("esper::relu_observe")
def _(x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("esper::relu_observe_grad")
def _(
    grad: Tensor, y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int
) -> Tensor:
    return torch.empty_like(y)


@torch.library.register_fake("esper::blend")
def _(
    y: Tensor,
    outs: list[Tensor],
    seeds: list[int],
    starts: list[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
) -> Tensor:
    return torch.empty_like(_in_order(y, channel_dim, _has_channels_last(y, channel_dim)))


@torch.library.register_fake("esper::blend_")
def _(
    y: Tensor,
    outs: list[Tensor],
    seeds: list[int],
    starts: list[int],
    alpha: Tensor,
    channel_dim: int,
    non_finite: Tensor,
    fault: Tensor,
) -> None:
    return None


@torch.library.register_fake("esper::blend_backward")
def _(
    grad: Tensor,
    y: Tensor | None,
    outs: list[Tensor],
    seeds: list[int],
    starts: list[int],
    alpha: Tensor,
    channel_dim: int,
    needed: list[bool],
) -> list[Tensor]:
    channels_last = _has_channels_last(grad, channel_dim)
    grads = [
        torch.empty_like(_in_order(t, channel_dim, channels_last))
        for t, wanted in zip((grad, *outs), needed, strict=True)
        if wanted
    ]
    return grads if y is None else [*grads, torch.empty_like(alpha)]


@torch.library.register_fake("esper::guard_grads")
def _(grads: list[Tensor], non_finite: Tensor, fault: Tensor) -> list[Tensor]:
    return [torch.empty_like(grad) for grad in grads]


def _has_channels_last(t: Tensor, channel_dim: int) -> bool:
    return not t.is_contiguous() and t.movedim(channel_dim, -1).is_contiguous()


def _in_order(t: Tensor, channel_dim: int, channels_last: bool) -> Tensor:
    if not channels_last:
        return t.contiguous()
    return t.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
