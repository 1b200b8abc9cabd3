"""esper::blend and its backward against literals, the reference and torch's own checkers."""

import math

import pytest
import torch
from blend_cases import CASES, DTYPES, LAYOUTS, Case, laid_out, make_cells, samples
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, matches_storage
from torch import Tensor

from esper import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ALPHAS = (0.0, 0.3, 0.5, 0.8, 1.0)


def native_backward(
    grad: Tensor, y: Tensor, out: Tensor, alpha: Tensor, channel_dim: int, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.esper.blend_backward(grad, y, out, alpha, channel_dim, start)


def test_literals(device: str) -> None:
    y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=device, requires_grad=True)
    out = torch.tensor([[4.0, 7.0], [1.0, torch.nan]], device=device, requires_grad=True)
    cells = make_cells(0.25, device)
    cells.alpha.requires_grad_()

    result = ops.blend(y, out, cells.alpha, 1, 1, cells.non_finite, cells.fault)

    assert result.tolist() == [[1.0, 2.5, 4.0], [4.0, 4.0, 6.0]]
    assert cells.non_finite.tolist() == [1.0]
    assert cells.fault.tolist() == [1]

    result.backward(torch.tensor([[8.0, 4.0, 2.0], [1.0, -4.0, 16.0]], device=device))
    assert y.grad is not None
    assert out.grad is not None
    assert cells.alpha.grad is not None
    assert y.grad.tolist() == [[8.0, 3.0, 1.5], [1.0, -3.0, 16.0]]
    assert out.grad.tolist() == [[1.0, 0.5], [-1.0, 0.0]]
    assert cells.alpha.grad.tolist() == [4 * 2.0 + 2 * 4.0 - 4 * -4.0]


def test_a_non_finite_gradient_reaches_the_host_alone(device: str) -> None:
    inf = torch.inf
    y = torch.tensor([1.0, 2.0, 3.0, inf], device=device, requires_grad=True)
    out = torch.tensor([5.0, 5.0, inf, 5.0], device=device, requires_grad=True)
    cells = make_cells(0.25, device)
    cells.alpha.requires_grad_()

    result = ops.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    cells.non_finite.zero_()
    cells.fault.zero_()
    result.backward(torch.tensor([8.0, inf, -inf, -inf], device=device))

    assert y.grad is not None
    assert out.grad is not None
    assert cells.alpha.grad is not None
    assert y.grad.tolist() == [6.0, inf, -inf, -inf]
    assert out.grad.tolist() == [2.0, 0.0, 0.0, 0.0]
    assert cells.alpha.grad.tolist() == [8 * 4.0]
    assert cells.non_finite.item() == cells.fault.item() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    y, out, grad = samples(case, dtype, layout, device)
    for weight in ALPHAS:
        cells = make_cells(weight, device)
        at = (cells.alpha, case.channel_dim, case.start)
        result = ops.blend(y, out, *at, cells.non_finite, cells.fault)
        grads = native_backward(grad, y, out, *at)

        assert_close(result, reference.blend(y.double(), out.double(), *at), "blend")
        expected = reference.blend_backward(grad.double(), y.double(), out.double(), *at)
        for name, actual, wanted in zip(("y", "out", "alpha"), grads, expected, strict=True):
            assert_close(actual, wanted.double(), f"grad_{name}")
        lost = reference.blend_lost(y, out, case.channel_dim, case.start)
        assert cells.non_finite.item() == lost.item()
        assert cells.fault.item() == (lost.item() > 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backward_is_the_derivative_of_the_reference(case: Case) -> None:
    y, out, grad = samples(case, torch.float64, "contiguous")
    grad = reference.finite(grad)  # the seed is spared the rest, see the literals above
    for weight in (0.3, 0.8):
        leaves = [y.requires_grad_(), out.requires_grad_(), torch.tensor([weight]).requires_grad_()]
        result = reference.blend(*leaves, case.channel_dim, case.start)
        grads = torch.autograd.grad(result, leaves, grad)
        expected = reference.blend_backward(
            grad, *(leaf.detach() for leaf in leaves), case.channel_dim, case.start
        )
        for name, actual, wanted in zip(("y", "out", "alpha"), grads, expected, strict=True):
            assert_close(actual, wanted.double(), f"grad_{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_zero_is_the_host_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    special = [-0.0, 0.0, torch.nan, torch.inf, -torch.inf, 1.0, 3e4, -3e4]
    y = torch.tensor(special, dtype=torch.float64).to(dtype).to(device)
    out = y.flip(0)
    cells = make_cells(0.0, device)
    result = ops.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert matches_storage(result, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_one_is_the_kernel_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    y = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -5.0]).to(dtype).to(device)
    out = torch.tensor([-0.0, 0.0, 2.0, -3e4, 0.1]).to(dtype).to(device)
    cells = make_cells(1.0, device)
    result = ops.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert matches_storage(result, out)
    assert cells.fault.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_outputs_blend_to_exactly_themselves(dtype: torch.dtype, device: str) -> None:
    y = torch.randn(4096).to(dtype).to(device)
    for weight in torch.linspace(0, 1, 23).tolist():
        cells = make_cells(weight, device)
        result = ops.blend(y, y.clone(), cells.alpha, 0, 0, cells.non_finite, cells.fault)
        assert matches_storage(result, y)


@pytest.mark.parametrize("weight", ALPHAS)
def test_finite_ends_never_overflow(weight: float, device: str) -> None:
    limit = torch.finfo(torch.float32).max
    y = torch.tensor([limit, -limit], device=device)
    cells = make_cells(weight, device)
    result = ops.blend(y, -y, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert result.isfinite().all()


def test_counts_only_what_the_kernel_broke(device: str) -> None:
    y = torch.tensor([1.0, torch.nan, 3.0, torch.inf], device=device)
    out = torch.tensor([torch.nan, torch.nan, torch.inf, 1.0], device=device)
    cells = make_cells(0.5, device)
    ops.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert cells.non_finite.item() == 2
    cells.fault.zero_()
    ops.blend(y[1:2], out[1:2], cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert cells.non_finite.item() == 2
    assert cells.fault.item() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_hosts_memory_format(memory_format: torch.memory_format, device: str) -> None:
    y = torch.randn(2, 8, 5, 5, device=device).to(memory_format=memory_format)
    out = torch.randn(2, 3, 5, 5, device=device)
    cells = make_cells(0.3, device)
    result = ops.blend(y, out, cells.alpha, 1, 2, cells.non_finite, cells.fault)
    assert result.stride() == y.stride()
    grad_y, grad_out, _ = native_backward(torch.randn_like(result), y, out, cells.alpha, 1, 2)
    assert grad_y.stride() == y.stride()
    assert grad_out.is_contiguous(memory_format=memory_format)


def test_inputs_are_left_alone(device: str) -> None:
    y, out = torch.randn(4, 6, device=device), torch.randn(4, 2, device=device)
    before = y.clone(), out.clone()
    cells = make_cells(0.3, device)
    ops.blend(y, out, cells.alpha, 1, 0, cells.non_finite, cells.fault)
    assert torch.equal(y, before[0])
    assert torch.equal(out, before[1])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_gradcheck(case: Case, device: str) -> None:
    y = torch.randn(case.shape, dtype=torch.float64, device=device, requires_grad=True)
    out = torch.randn(case.out_shape, dtype=torch.float64, device=device, requires_grad=True)
    cells = make_cells(0.3, device)

    def blend(y: Tensor, out: Tensor) -> Tensor:
        at = case.channel_dim, case.start
        return ops.blend(y, out, cells.alpha, *at, cells.non_finite, cells.fault)

    torch.autograd.gradcheck(blend, (y, out))


def test_nan_in_out_poisons_no_gradient(device: str) -> None:
    y = torch.randn(3, 4, device=device, requires_grad=True)
    out = torch.full((3, 2), torch.nan, device=device, requires_grad=True)
    cells = make_cells(0.7, device)
    for blend in (
        ops.blend(y, out, cells.alpha, 1, 1, cells.non_finite, cells.fault),
        reference.blend(y, out, cells.alpha, 1, 1),
    ):
        grad_y, grad_out = torch.autograd.grad(blend.sum(), (y, out))
        assert torch.equal(grad_y, torch.ones_like(y))
        assert torch.equal(grad_out, torch.zeros_like(out))


def test_arena_cells_may_change_before_backward(device: str) -> None:
    arena = torch.zeros(8, device=device)
    fault = torch.zeros(1, dtype=torch.uint8, device=device)
    arena[0] = 0.5
    y = torch.randn(4, device=device, requires_grad=True)
    out = torch.randn(4, device=device, requires_grad=True)
    result = ops.blend(y, out, arena[0:1], 0, 0, arena[1:2], fault)
    arena[2:].add_(1)
    grad_y, _ = torch.autograd.grad(result.sum(), (y, out))
    assert torch.equal(grad_y, torch.full_like(y, 0.5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("op", ["blend", "blend_backward"])
def test_opcheck(op: str, layout: str, device: str) -> None:
    y, out, grad = samples(Case((3, 8, 5, 7), 1, 1, 4), torch.float32, layout, device)
    cells = make_cells(0.3, device)
    arguments = {
        "blend": (y, out, cells.alpha, 1, 1, cells.non_finite, cells.fault),
        # opcheck takes NaN for a difference.
        "blend_backward": (reference.finite(grad), y, out, cells.alpha, 1, 1),
    }
    # Gradients are attached by ops.blend, not at the dispatcher, so inputs here require none.
    torch.library.opcheck(getattr(torch.ops.esper, op), arguments[op])


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    start = data.draw(st.integers(0, shape[channel_dim]))
    size = data.draw(st.integers(0, shape[channel_dim] - start))
    weight = data.draw(st.floats(0, 1, width=32))
    case = Case(shape, channel_dim, start, size)
    y, out, _ = samples(case, torch.float32, data.draw(st.sampled_from(LAYOUTS)))
    cells = make_cells(weight)
    result = ops.blend(y, out, cells.alpha, channel_dim, start, cells.non_finite, cells.fault)
    expected = reference.blend(y.double(), out.double(), cells.alpha, channel_dim, start)
    assert_close(result, expected, "blend")


def test_grad_alpha_is_the_same_for_any_number_of_threads() -> None:
    y, out, grad = torch.randn(700, 300), torch.randn(700, 200), torch.randn(700, 300)
    alpha = torch.tensor([0.3])
    single = native_backward(grad, y, out, alpha, 1, 50)[2]
    torch.set_num_threads(2)
    try:
        double = native_backward(grad, y, out, alpha, 1, 50)[2]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(single, double)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blend_counts_and_differentiates(backend: str) -> None:
    torch.compiler.reset()
    cells = make_cells(0.3)
    y, out = torch.randn(4, 6), torch.randn(4, 2)
    out[0, 0] = math.nan

    def blend(y: Tensor, out: Tensor) -> Tensor:
        return ops.blend(y, out, cells.alpha, 1, 3, cells.non_finite, cells.fault)

    leaves = y.requires_grad_(), out.requires_grad_()
    result = torch.compile(blend, fullgraph=True, backend=backend)(*leaves)
    assert cells.non_finite.item() == 1
    assert cells.fault.item() == 1
    grads = torch.autograd.grad(result.square().sum(), leaves)
    eager = blend(*leaves)
    assert_close(result, eager.double(), "blend")
    for name, actual, expected in zip(
        ("y", "out"), grads, torch.autograd.grad(eager.square().sum(), leaves), strict=True
    ):
        assert_close(actual, expected.double(), f"grad_{name}")


def test_exported_blend_is_plain_pytorch() -> None:
    class Blend(torch.nn.Module):
        def forward(self, y: Tensor, out: Tensor) -> Tensor:
            cells = make_cells(0.3)
            return ops.blend(y, out, cells.alpha, 1, 3, cells.non_finite, cells.fault)

    inputs = torch.randn(4, 6), torch.randn(4, 2)
    program = torch.export.export(Blend(), inputs)
    assert "esper" not in str(program.graph)
    assert_close(program.module()(*inputs), Blend()(*inputs).double(), "blend")


def test_compiled_blend_spares_the_seed_a_non_finite_gradient() -> None:
    torch.compiler.reset()
    cells = make_cells(0.25)
    out = torch.tensor([5.0, 5.0], requires_grad=True)

    def blend(y: Tensor, out: Tensor) -> Tensor:
        return ops.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)

    result = torch.compile(blend, fullgraph=True, backend="aot_eager")(torch.ones(2), out)
    result.backward(torch.tensor([8.0, torch.inf]))
    assert out.grad is not None
    assert out.grad.tolist() == [2.0, 0.0]


WRONG = {
    "integers": (
        {"y": torch.zeros(4, 6, dtype=torch.int64)},
        r"y must be float32, float64, float16 or bfloat16, got Long",
    ),
    "out of another dtype": ({"out": torch.zeros(4, 2).double()}, r"out must be Float, got Double"),
    "out of another rank": ({"out": torch.zeros(8)}, r"out must have y's shape \(4, 6, \) except"),
    "out of another size": ({"out": torch.zeros(3, 2)}, r"channel_dim 1, got \(3, 2, \)"),
    "alpha of two": ({"alpha": torch.zeros(2)}, r"alpha must have one element, got shape \(2, \)"),
    "alpha of doubles": ({"alpha": torch.zeros(1).double()}, r"alpha must be Float, got Double"),
    "no such dimension": ({"channel_dim": 2}, r"channel_dim must be a dimension of y .*got 2"),
    "negative start": ({"start": -1}, r"start must lie in \[0, 4\] for 2 channels of 6, got -1"),
    "start too high": ({"start": 5}, r"start must lie in \[0, 4\] for 2 channels of 6, got 5"),
    "fault of floats": ({"fault": torch.zeros(1)}, r"fault must be Byte, got Float"),
    "count of integers": (
        {"non_finite": torch.zeros(1, dtype=torch.int32)},
        r"non_finite must be Float, got Int",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    cells = make_cells(0.3)
    arguments = {
        "y": torch.zeros(4, 6),
        "out": torch.zeros(4, 2),
        "alpha": cells.alpha,
        "channel_dim": 1,
        "start": 0,
        "non_finite": cells.non_finite,
        "fault": cells.fault,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esper.blend(**(arguments | change))


def test_wrong_gradient() -> None:
    y, out = torch.zeros(4, 6), torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match=r"grad must have y's shape \(4, 6, \), got \(4, 5, \)"):
        native_backward(torch.zeros(4, 5), y, out, torch.zeros(1), 1, 0)


@pytest.mark.cuda
def test_wrong_device() -> None:
    cells = make_cells(0.3)
    y = torch.zeros(4, 6, device="cuda")
    with pytest.raises(RuntimeError, match="on cuda:0"):
        ops.blend(y, y, cells.alpha, 1, 0, cells.non_finite, cells.fault)


@pytest.mark.cuda
def test_never_waits_for_the_device() -> None:
    y, out = torch.randn(64, 32, device="cuda"), torch.randn(64, 8, device="cuda")
    leaves = y.requires_grad_(), laid_out(out, "contiguous", 1).requires_grad_()
    cells = make_cells(0.3, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = ops.blend(*leaves, cells.alpha, 1, 8, cells.non_finite, cells.fault)
        result.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
