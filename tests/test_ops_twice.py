"""Second derivatives through blend, isolate and guard, as a gradient penalty needs them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from blend_cases import CASES, SMALL_CASES, Case, Fields, fields_of, make_cells, samples
from tolerances import assert_close
from torch import Tensor, nn

from esper import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def blend(y: Tensor, out: Tensor, cells: Fields, channel_dim: int = 0, start: int = 0) -> Tensor:
    """Blend the only seed of a layer."""
    at = cells.alpha, channel_dim, cells.non_finite, cells.fault
    return ops.blend(y, [out], [0], [start], *at)


def blend_case(
    case: Case, y: Tensor, outs: Sequence[Tensor], fields: Fields, *, in_place: bool = False
) -> Tensor:
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    return ops.blend(y, outs, *at, fields.non_finite, fields.fault, in_place=in_place)


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradgradcheck_of_blend(case: Case, in_place: bool, device: str) -> None:
    y, *outs = (leaf(*shape, device=device) for shape in (case.shape, *case.out_shapes))
    fields = fields_of(case, 0.3, device)

    def cubed(y: Tensor, *outs: Tensor) -> Tensor:
        # Multiplied, not raised: a power saves its result, which in place must not happen.
        return blend_case(case, y * y * y, [out**3 for out in outs], fields, in_place=in_place)

    torch.autograd.gradgradcheck(cubed, (y, *outs))


def test_gradgradcheck_of_a_guarded_kernel(device: str) -> None:
    y, weight = leaf(3, 4, device=device), leaf(2, 2, device=device)
    cells = make_cells(0.3, device)

    def layer(y: Tensor, weight: Tensor) -> Tensor:
        act, w = ops.guard(cells.non_finite, cells.fault, y.narrow(1, 1, 2), weight)
        return blend(y, (act @ w).tanh(), cells, 1, 1) ** 2

    torch.autograd.gradgradcheck(layer, (y, weight))
    assert cells.non_finite.item() == cells.fault.item() == 0


def test_gradgradcheck_of_an_isolated_host(device: str) -> None:
    y, out = leaf(3, 4, device=device), torch.randn(3, 2, dtype=torch.float64, device=device)
    torch.autograd.gradgradcheck(lambda y: ops.isolate(y**3, out, 1, 1) ** 2, y)


@pytest.mark.parametrize("weight", [0.3, 0.8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_match_the_reference(case: Case, weight: float, device: str) -> None:
    y, outs, grad = samples(case, torch.float64, "contiguous", device)
    y, grad, *outs = (reference.finite(t).requires_grad_() for t in (y, grad, *outs))
    fields = fields_of(case, weight, device)
    # An alpha of 0 or 1 is a copy, where the reference has no slope.
    fields.alpha.clamp_(0.1, 0.9).requires_grad_()
    leaves = y, *outs, fields.alpha

    def second(result: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(result, leaves, grad, create_graph=True)
        penalty = torch.stack([g.double().square().sum() for g in grads]).sum()
        return torch.autograd.grad(penalty, (*leaves, grad))

    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    actual = second(blend_case(case, y, outs, fields))
    expected = second(reference.blend(y, outs, *at))
    for i, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_close(mine, wanted.double(), f"second derivative {i} by y, outs, alpha and grad")


def test_what_is_masked_poisons_no_second_derivative(device: str) -> None:
    y = torch.tensor([1.0, torch.nan, 3.0, 4.0], device=device, requires_grad=True)
    out = torch.tensor([torch.inf, torch.nan, 5.0, 7.0], device=device, requires_grad=True)
    grad = torch.tensor([torch.nan, torch.inf, torch.inf, 2.0], device=device, requires_grad=True)
    cells = make_cells(0.25, device)
    cells.alpha.requires_grad_()
    leaves = y, out, cells.alpha
    result = blend(y, out, cells)
    grads = torch.autograd.grad(result, leaves, grad, create_graph=True)
    weights = [torch.ones_like(g) for g in grads[1:]]
    by_out, by_alpha, by_grad = torch.autograd.grad(
        grads[1:], (out, cells.alpha, grad), weights, materialize_grads=True
    )
    assert by_out.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert by_alpha.tolist() == [2.0]
    assert by_grad.tolist() == [0.0, 0.0, 0.0, 0.25 + 3.0]


def test_gradient_penalty_trains_as_plain_pytorch_does(device: str) -> None:
    cells = make_cells(0.3, device)
    x = torch.randn(8, 5, dtype=torch.float64, device=device)
    host = nn.Linear(5, 6, dtype=torch.float64, device=device)
    kernel = nn.Linear(3, 3, dtype=torch.float64, device=device)
    weights = [*host.parameters(), *kernel.parameters()]

    def through_esper(act: Tensor) -> Tensor:
        guarded, w, b = ops.guard(
            cells.non_finite, cells.fault, act[:, 2:5], kernel.weight, kernel.bias
        )
        return blend(act, nn.functional.linear(guarded, w, b).tanh(), cells, 1, 2)

    def plainly(act: Tensor) -> Tensor:
        chunk = act[:, 2:5]
        blended = chunk + cells.alpha.double() * (kernel(chunk).tanh() - chunk)
        return torch.cat([act[:, :2], blended, act[:, 5:]], 1)

    def step(layer: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        loss = layer(host(given)).tanh().square().sum()
        (by_input,) = torch.autograd.grad(loss, given, create_graph=True)
        penalty = (by_input.norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss + 10 * penalty, weights)

    for actual, expected in zip(step(through_esper), step(plainly), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


class Backwards(torch.autograd.Function):
    """The identity, with whatever it is told to do for a gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, derive: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.derive = derive
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.derive(grad), None


def kernel_with_bad_second_derivative(act: Tensor) -> Tensor:
    return Backwards.apply(act, lambda grad: Backwards.apply(grad, lambda g: g * torch.nan))


def test_a_kernels_bad_second_derivative_stays_out_of_the_host(device: str) -> None:
    cells = make_cells(0.5, device)
    y = torch.ones(2, device=device, requires_grad=True)
    (act,) = ops.guard(cells.non_finite, cells.fault, y)
    result = blend(y, kernel_with_bad_second_derivative(act), cells).square().sum()
    (by_y,) = torch.autograd.grad(result, y, create_graph=True)
    assert cells.fault.item() == 0
    (second,) = torch.autograd.grad(by_y.sum(), y)
    assert second.isfinite().all()
    assert cells.non_finite.item() == 2
    assert cells.fault.item() == 1


def test_a_non_finite_second_gradient_is_not_blamed_on_the_seed(device: str) -> None:
    cells = make_cells(0.5, device)
    y = torch.ones(2, device=device, requires_grad=True)
    (act,) = ops.guard(cells.non_finite, cells.fault, y)
    result = blend(y, act**3, cells).square().sum()
    (by_y,) = torch.autograd.grad(result, y, create_graph=True)
    overflow = torch.full_like(y, torch.inf)
    torch.autograd.grad(by_y, y, overflow)
    assert cells.non_finite.item() == cells.fault.item() == 0


def test_second_derivatives_of_an_isolated_seed_leave_the_host_alone(device: str) -> None:
    x = torch.randn(4, device=device, requires_grad=True)
    weight = torch.randn(4, device=device, requires_grad=True)

    def penalised(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    (alone,) = penalised(x.tanh(), x)
    out = (x.detach() * weight).sin()
    with_seed, by_weight = penalised(ops.isolate(x.tanh(), out, 0, 0), x, weight)
    assert torch.equal(alone, with_seed)
    assert by_weight.abs().min() > 0
