"""ops.isolate: the host runs on as if there were no seed, and the seed still learns."""

import pytest
import torch
from blend_cases import LAYOUTS, laid_out
from tolerances import matches_storage

from esper import ops


def test_literals(device: str) -> None:
    y = torch.tensor([[1.0, 2.0, 3.0]], device=device, requires_grad=True)
    out = torch.tensor([[torch.nan, 9.0]], device=device, requires_grad=True)
    result = ops.isolate(y, out, 1, 1)
    assert result.tolist() == [[1.0, 2.0, 3.0]]
    result.backward(torch.tensor([[5.0, 6.0, 7.0]], device=device))
    assert y.grad is not None
    assert out.grad is not None
    assert y.grad.tolist() == [[5.0, 6.0, 7.0]]
    assert out.grad.tolist() == [[6.0, 7.0]]


def test_a_non_finite_gradient_reaches_the_host_alone(device: str) -> None:
    y = torch.zeros(4, device=device, requires_grad=True)
    out = torch.zeros(3, device=device, requires_grad=True)
    grad = torch.tensor([1.0, torch.nan, -0.0, -torch.inf], device=device)
    ops.isolate(y, out, 0, 1).backward(grad)
    assert y.grad is not None
    assert out.grad is not None
    assert matches_storage(y.grad, grad)
    assert out.grad.tolist() == [0.0, -0.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_shares_memory_and_keeps_every_bit(layout: str, channel_dim: int, device: str) -> None:
    y = laid_out(torch.randn(4, 6, 5), layout, channel_dim).to(device)
    y[0, 0, 0], y[0, 0, 1] = -0.0, torch.nan
    out = y.narrow(channel_dim, 1, 2).clone().requires_grad_()
    result = ops.isolate(y, out, channel_dim, 1)
    assert result.data_ptr() == y.data_ptr()
    assert result.stride() == y.stride()
    assert matches_storage(result.detach(), y)


def test_a_frozen_host_still_teaches_the_seed(device: str) -> None:
    y, out = torch.randn(2, 4, device=device), torch.randn(2, 2, device=device, requires_grad=True)
    ops.isolate(y, out, 1, 2).sum().backward()
    assert out.grad is not None
    assert out.grad.tolist() == [[1.0, 1.0]] * 2


def test_host_may_go_on_in_place(device: str) -> None:
    x = torch.tensor([-1.0, 2.0], device=device, requires_grad=True)
    out = torch.zeros(2, device=device, requires_grad=True)
    torch.relu_(ops.isolate(x * 3, out, 0, 0)).sum().backward()
    assert x.grad is not None
    assert out.grad is not None
    assert x.grad.tolist() == [0.0, 3.0]
    assert out.grad.tolist() == [0.0, 1.0]


def test_host_may_have_saved_its_output(device: str) -> None:
    x = torch.tensor([0.5], device=device, requires_grad=True)
    out = torch.zeros(1, device=device, requires_grad=True)
    ops.isolate(x.tanh(), out, 0, 0).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(1 - torch.tensor(0.5).tanh().item() ** 2)


def test_compiles_whole() -> None:
    torch.compiler.reset()
    y = torch.randn(3, 4, requires_grad=True)
    out = torch.randn(3, 2, requires_grad=True)

    def isolated(y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return ops.isolate(y * 2, out, 1, 1) * 3

    result = torch.compile(isolated, fullgraph=True, backend="aot_eager")(y, out)
    assert torch.equal(result, y * 6)
    result.sum().backward()
    assert y.grad is not None
    assert out.grad is not None
    assert torch.equal(y.grad, torch.full_like(y, 6))
    assert torch.equal(out.grad, torch.full_like(out, 3))
