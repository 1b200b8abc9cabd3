"""esper::guard_grads and ops.guard, the gate through which a kernel's gradients leave it."""

import pytest
import torch
from blend_cases import DTYPES, LAYOUTS, laid_out, make_cells
from tolerances import matches_storage
from torch import Tensor

from esper import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_literals(device: str) -> None:
    cells = make_cells(0.0, device)
    grads = [
        torch.tensor([1.0, torch.nan, -0.0], device=device),
        torch.tensor([[torch.inf], [-torch.inf], [2.0]], device=device),
    ]
    clean = torch.ops.esper.guard_grads(grads, cells.non_finite, cells.fault)
    assert [grad.tolist() for grad in clean] == [[1.0, 0.0, -0.0], [[0.0], [0.0], [2.0]]]
    assert cells.non_finite.tolist() == [3.0]
    assert cells.fault.tolist() == [1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (1,), (0, 4), (3, 1, 5)])
def test_matches_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> None:
    grad = torch.randn(shape).to(dtype)
    if grad.numel() > 3:
        grad.view(-1)[1], grad.view(-1)[3] = torch.nan, torch.inf
    grad = laid_out(grad, layout, min(1, len(shape) - 1)).to(device)
    native, plain = make_cells(0.0, device), make_cells(0.0, device)
    (actual,) = torch.ops.esper.guard_grads([grad], native.non_finite, native.fault)
    (expected,) = reference.guard_grads([grad], plain.non_finite, plain.fault)
    assert matches_storage(actual, expected)
    assert torch.equal(native.non_finite, plain.non_finite)
    assert torch.equal(native.fault, plain.fault)


def test_finite_gradients_raise_no_fault(device: str) -> None:
    cells = make_cells(0.0, device)
    grad = torch.randn(5, 7, device=device)
    (clean,) = torch.ops.esper.guard_grads([grad], cells.non_finite, cells.fault)
    assert torch.equal(clean, grad)
    assert clean.data_ptr() != grad.data_ptr()
    assert cells.non_finite.item() == cells.fault.item() == 0


def test_expanded_gradient(device: str) -> None:
    cells = make_cells(0.0, device)
    grad = torch.tensor([torch.nan, 1.0], device=device).expand(3, 2)
    (clean,) = torch.ops.esper.guard_grads([grad], cells.non_finite, cells.fault)
    assert clean.tolist() == [[0.0, 1.0]] * 3
    assert cells.non_finite.item() == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, device: str) -> None:
    cells = make_cells(0.0, device)
    grads = [laid_out(torch.randn(3, 8, 5), layout, 1).to(device), torch.randn(4, device=device)]
    # No test_aot_dispatch_dynamic: torch cannot functionalise an op that changes an argument and
    # returns a list. Compilers never see this op, see test_compiled_guard below.
    torch.library.opcheck(
        torch.ops.esper.guard_grads,
        (grads, cells.non_finite, cells.fault),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_guard_copies_nothing_and_cleans_each_gradient(device: str) -> None:
    cells = make_cells(0.0, device)
    a = torch.randn(2, device=device, requires_grad=True)
    b = torch.randn(2, device=device, requires_grad=True)
    frozen = torch.randn(2, device=device)
    index = torch.zeros(2, dtype=torch.int64, device=device)

    guarded = ops.guard(cells.non_finite, cells.fault, a, frozen, b, index)

    assert [t.data_ptr() for t in guarded] == [t.data_ptr() for t in (a, frozen, b, index)]
    assert guarded[1] is frozen
    assert guarded[3] is index
    weight = torch.tensor([torch.nan, 3.0], device=device)
    ((guarded[0] * weight).sum() + (guarded[2] * 5).sum()).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [0.0, 3.0]
    assert b.grad.tolist() == [5.0, 5.0]
    assert cells.non_finite.item() == 1
    assert cells.fault.item() == 1


def test_guard_passes_unused_tensors(device: str) -> None:
    cells = make_cells(0.0, device)
    a = torch.randn(2, device=device, requires_grad=True)
    b = torch.randn(2, device=device, requires_grad=True)
    clean_a, _ = ops.guard(cells.non_finite, cells.fault, a, b)
    clean_a.sum().backward()
    assert a.grad is not None
    assert b.grad is None


def test_guard_without_gradients_returns_the_very_tensors(device: str) -> None:
    cells = make_cells(0.0, device)
    a = torch.randn(2, device=device, requires_grad=True)
    with torch.no_grad():
        assert ops.guard(cells.non_finite, cells.fault, a)[0] is a


def test_compiled_guard_counts_in_the_backward_pass() -> None:
    torch.compiler.reset()
    cells = make_cells(0.0)

    def weighted(t: Tensor, weight: Tensor) -> Tensor:
        (clean,) = ops.guard(cells.non_finite, cells.fault, t)
        return clean * weight

    t = torch.randn(2, requires_grad=True)
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    compiled(t, torch.tensor([torch.inf, 3.0])).sum().backward()
    assert t.grad is not None
    assert t.grad.tolist() == [0.0, 3.0]
    assert cells.non_finite.item() == 1
    assert cells.fault.item() == 1


def test_wrong_arguments() -> None:
    cells = make_cells(0.0)
    guard_grads = torch.ops.esper.guard_grads
    with pytest.raises(RuntimeError, match=r"grad must be float32, .* got Int"):
        guard_grads([torch.zeros(2, dtype=torch.int32)], cells.non_finite, cells.fault)
    with pytest.raises(RuntimeError, match=r"non_finite must have one element, got shape \(2, \)"):
        guard_grads([torch.zeros(2)], torch.zeros(2), cells.fault)
    with pytest.raises(RuntimeError, match=r"fault must be Byte, got Float"):
        guard_grads([torch.zeros(2)], cells.non_finite, torch.zeros(1))
