"""esper::blend and its backward against literals, the reference and torch's own checkers."""

from collections.abc import Sequence

import pytest
import torch
from blend_cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    SMALL_CASES,
    Case,
    Fields,
    fields_of,
    make_cells,
    make_fields,
    samples,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, matches_storage
from torch import Tensor

from esper import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ALPHAS = (0.0, 0.3, 0.5, 0.8, 1.0)


def blend(y: Tensor, out: Tensor, cells: Fields, channel_dim: int = 0, start: int = 0) -> Tensor:
    """Blend the only seed of a layer."""
    at = cells.alpha, channel_dim, cells.non_finite, cells.fault
    return ops.blend(y, [out], [0], [start], *at)


def blend_case(
    case: Case, y: Tensor, outs: Sequence[Tensor], fields: Fields, *, in_place: bool = False
) -> Tensor:
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    return ops.blend(y, outs, *at, fields.non_finite, fields.fault, in_place=in_place)


def native_backward(
    case: Case, grad: Tensor, y: Tensor, outs: Sequence[Tensor], alpha: Tensor
) -> list[Tensor]:
    """Return the gradients of y, of each out, and of alpha."""
    at = case.seeds, case.starts, alpha, case.channel_dim
    return torch.ops.esper.blend_backward(grad, y, outs, *at, [True] * (1 + len(outs)))


def in_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def assert_gradients_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_close(mine, wanted.double(), f"gradient {i} of y, outs and alpha")


def assert_counted(case: Case, y: Tensor, outs: Sequence[Tensor], fields: Fields) -> None:
    at = case.seeds, case.starts, case.channel_dim
    lost = reference.blend_lost(y, outs, *at, fields.non_finite)
    assert fields.non_finite.tolist() == lost.tolist()
    assert fields.fault.tolist() == (lost > 0).tolist()


def test_literals(device: str) -> None:
    y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=device, requires_grad=True)
    out = torch.tensor([[4.0, 7.0], [1.0, torch.nan]], device=device, requires_grad=True)
    cells = make_cells(0.25, device)
    cells.alpha.requires_grad_()

    result = blend(y, out, cells, 1, 1)

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

    result = blend(y, out, cells)
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


def test_literals_of_several_seeds(device: str) -> None:
    y = torch.arange(6.0, device=device).requires_grad_()
    outs = [torch.full((2,), value, device=device, requires_grad=True) for value in (8.0, 16.0)]
    fields = make_fields([0.5, 0.9, 0.25], device)
    fields.alpha.requires_grad_()

    at = fields.alpha, 0, fields.non_finite, fields.fault
    result = ops.blend(y, outs, [2, 0], [4, 1], *at)
    result.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], device=device))

    assert result.tolist() == [0.0, 8.5, 9.0, 3.0, 5.0, 5.75]
    assert y.grad is not None
    assert fields.alpha.grad is not None
    assert y.grad.tolist() == [1.0, 1.0, 2.0, 8.0, 12.0, 24.0]
    assert [out.grad.tolist() for out in outs if out.grad is not None] == [[4.0, 8.0], [1.0, 2.0]]
    assert fields.alpha.grad.tolist() == [2 * 15.0 + 4 * 14.0, 0.0, 16 * 4.0 + 32 * 3.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    y, outs, grad = samples(case, dtype, layout, device)
    wide_y, wide_grad, *wide_outs = in_double([y, grad, *outs])
    for weight in ALPHAS:
        fields = fields_of(case, weight, device)
        at = case.seeds, case.starts, fields.alpha, case.channel_dim
        result = blend_case(case, y, outs, fields)
        assert_close(result, reference.blend(wide_y, wide_outs, *at), "blend")
        assert_counted(case, y, outs, fields)
        needed = [True] * (1 + len(outs))
        assert_gradients_close(
            native_backward(case, grad, y, outs, fields.alpha),
            reference.blend_backward(wide_grad, wide_y, wide_outs, *at, needed),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place_is_the_same(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    y, outs, _ = samples(case, dtype, layout, device)
    for weight in ALPHAS:
        fields = fields_of(case, weight, device)
        target = torch.empty_strided(y.shape, y.stride(), dtype=dtype, device=device).copy_(y)
        expected = blend_case(case, y, outs, fields_of(case, weight, device))
        result = blend_case(case, target, outs, fields, in_place=True)
        assert result is target
        assert matches_storage(result, expected)
        assert_counted(case, y, outs, fields)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_in_place_changes_y_where_it_lies_and_nothing_else(grad_enabled: bool, device: str) -> None:
    base = torch.randn(4, 9, device=device)
    before = base.clone()
    y = base[:, 1:7]
    out = torch.randn(4, 2, device=device)
    version = base._version
    cells = make_cells(1.0, device)
    at = [0], [3], cells.alpha, 1, cells.non_finite, cells.fault
    with torch.set_grad_enabled(grad_enabled):
        result = ops.blend(y, [out], *at, in_place=True)
    before[:, 4:6] = out
    assert result is y
    assert torch.equal(base, before)
    assert base._version > version


@pytest.mark.parametrize("needs_y", [True, False])
def test_gradients_pass_through_a_blend_in_place(needs_y: bool, device: str) -> None:
    case = Case((3, 8), 1, (5, 0), (2, 3))
    x, outs, grad = samples(case, torch.float32, "contiguous", device)
    leaves = [*(out.requires_grad_() for out in outs)]
    if needs_y:
        leaves.append(x.requires_grad_())
    fields = fields_of(case, 0.3, device)
    apart = torch.autograd.grad(blend_case(case, x + 1, outs, fields), leaves, grad)
    in_place = blend_case(case, x + 1, outs, fields, in_place=True)
    together = torch.autograd.grad(in_place, leaves, grad)
    for mine, expected in zip(together, apart, strict=True):
        assert matches_storage(mine, expected)


def test_in_place_on_a_view_differentiates_its_base(device: str) -> None:
    x = torch.randn(4, 6, device=device, requires_grad=True)
    base = x * 1
    view = base.narrow(1, 2, 4)
    cells = make_cells(0.25, device)
    at = [0], [2], cells.alpha, 1, cells.non_finite, cells.fault
    ops.blend(view, [torch.randn(4, 2, device=device)], *at, in_place=True)
    (grad,) = torch.autograd.grad(base.sum(), x)
    assert grad[0].tolist() == [1.0, 1.0, 1.0, 1.0, 0.75, 0.75]


def test_in_place_never_reads_what_it_has_written(device: str) -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    # The second chunk's kernel returns the first chunk, which is overwritten before it is read.
    outs = [torch.full((2,), 9.0, device=device), y[0:2]]
    fields = make_fields([1.0, 1.0], device)
    at = [0, 1], [0, 2], fields.alpha, 0, fields.non_finite, fields.fault
    assert ops.blend(y, outs, *at, in_place=True).tolist() == [9.0, 9.0, 1.0, 2.0]


def test_in_place_under_inference_mode(device: str) -> None:
    cells = make_cells(0.5, device)
    with torch.inference_mode():
        y = torch.zeros(2, device=device)
        at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
        ops.blend(y, [torch.ones(2, device=device)], *at, in_place=True)
    assert y.tolist() == [0.5, 0.5]


def test_in_place_shows_autograd_what_it_has_overwritten(device: str) -> None:
    y = torch.randn(3, device=device, requires_grad=True).tanh()
    cells = make_cells(0.5, device)
    at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
    result = ops.blend(y, [torch.zeros(3, device=device)], *at, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_in_place_is_refused_where_it_is_not_sound(device: str) -> None:
    y, cells = torch.ones(2, device=device), make_cells(0.5, device)
    at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
    with pytest.raises(ValueError, match="needs a y that is no leaf"):
        ops.blend(y.requires_grad_(), [torch.zeros_like(y)], *at, in_place=True)
    cells.alpha.requires_grad_()
    with pytest.raises(ValueError, match="keeps no y for alpha's gradient"):
        ops.blend(y.detach(), [torch.zeros_like(y)], *at, in_place=True)
    assert y.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backward_is_the_derivative_of_the_reference(case: Case) -> None:
    y, outs, grad = samples(case, torch.float64, "contiguous")
    grad = reference.finite(grad)  # the seed is spared the rest, see the literals above
    for weight in (0.3, 0.8):
        alpha = make_fields([weight] * case.num_seeds).alpha.requires_grad_()
        at = case.seeds, case.starts, alpha, case.channel_dim
        leaves = [y.requires_grad_(), *(out.requires_grad_() for out in outs), alpha]
        result = reference.blend(y, outs, *at)
        grads = torch.autograd.grad(result, leaves, grad)
        needed = [True] * (1 + len(outs))
        expected = reference.blend_backward(grad, y, outs, *at, needed)
        assert_gradients_close(grads, [each.detach() for each in expected])


@pytest.mark.parametrize("place", ["native", "reference"])
def test_backward_returns_what_is_needed_and_no_more(place: str, device: str) -> None:
    case = Case((3, 8), 1, (5, 0), (2, 3))
    y, outs, grad = samples(case, torch.float32, "contiguous", device)
    at = case.seeds, case.starts, fields_of(case, 0.3, device).alpha, case.channel_dim
    backward = (torch.ops.esper if place == "native" else reference).blend_backward
    grad_y, first, second, grad_alpha = backward(grad, y, outs, *at, [True] * 3)
    for needed, expected in (
        ([True, True, True], [grad_y, first, second]),
        ([True, False, False], [grad_y]),
        ([False, True, True], [first, second]),
        ([False, False, True], [second]),
        ([False, False, False], []),
    ):
        for host, more in ((None, []), (y, [grad_alpha])):
            grads = backward(grad, host, outs, *at, needed)
            assert len(grads) == len(expected) + len(more)
            for mine, wanted in zip(grads, [*expected, *more], strict=True):
                assert matches_storage(mine, wanted)


def test_y_is_saved_for_alphas_gradient_alone(device: str) -> None:
    case = Case((3, 8), 1, (5, 0), (2, 3))
    y, outs, _ = samples(case, torch.float32, "contiguous", device)
    fields = fields_of(case, 0.3, device)
    y.requires_grad_()

    def shapes_saved() -> list[tuple[int, ...]]:
        saved = blend_case(case, y, outs, fields).grad_fn.saved_tensors
        return [tuple(t.shape) for t in saved if t is not None]

    assert shapes_saved() == case.out_shapes
    fields.alpha.requires_grad_()
    assert shapes_saved() == [case.shape, *case.out_shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_zero_is_the_host_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    special = [-0.0, 0.0, torch.nan, torch.inf, -torch.inf, 1.0, 3e4, -3e4]
    y = torch.tensor(special, dtype=torch.float64).to(dtype).to(device)
    out = y.flip(0)
    cells = make_cells(0.0, device)
    result = blend(y, out, cells)
    assert matches_storage(result, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_one_is_the_kernel_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    y = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -5.0]).to(dtype).to(device)
    out = torch.tensor([-0.0, 0.0, 2.0, -3e4, 0.1]).to(dtype).to(device)
    cells = make_cells(1.0, device)
    result = blend(y, out, cells)
    assert matches_storage(result, out)
    assert cells.fault.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_outputs_blend_to_exactly_themselves(dtype: torch.dtype, device: str) -> None:
    y = torch.randn(4096).to(dtype).to(device)
    for weight in torch.linspace(0, 1, 23).tolist():
        cells = make_cells(weight, device)
        result = blend(y, y.clone(), cells)
        assert matches_storage(result, y)


@pytest.mark.parametrize("weight", ALPHAS)
def test_finite_ends_never_overflow(weight: float, device: str) -> None:
    limit = torch.finfo(torch.float32).max
    y = torch.tensor([limit, -limit], device=device)
    cells = make_cells(weight, device)
    result = blend(y, -y, cells)
    assert result.isfinite().all()


def test_counts_only_what_the_kernel_broke(device: str) -> None:
    y = torch.tensor([1.0, torch.nan, 3.0, torch.inf], device=device)
    out = torch.tensor([torch.nan, torch.nan, torch.inf, 1.0], device=device)
    cells = make_cells(0.5, device)
    blend(y, out, cells)
    assert cells.non_finite.item() == 2
    cells.fault.zero_()
    blend(y[1:2], out[1:2], cells)
    assert cells.non_finite.item() == 2
    assert cells.fault.item() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_hosts_memory_format(memory_format: torch.memory_format, device: str) -> None:
    y = torch.randn(2, 8, 5, 5, device=device).to(memory_format=memory_format)
    out = torch.randn(2, 3, 5, 5, device=device)
    cells = make_cells(0.3, device)
    result = blend(y, out, cells, 1, 2)
    assert result.stride() == y.stride()
    grad_y, grad_out = torch.ops.esper.blend_backward(
        torch.randn_like(result), None, [out], [0], [2], cells.alpha, 1, [True, True]
    )
    assert grad_y.stride() == y.stride()
    assert grad_out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [5, 90])  # of several tiles each
def test_outs_may_be_parts_of_one_tensor(
    size: int, memory_format: torch.memory_format, device: str
) -> None:
    y, made = (
        torch.randn(3, channels, size, size, device=device).to(memory_format=memory_format)
        for channels in (12, 14)
    )
    made[1, 3, 2, 2] = torch.nan
    parts = [made.narrow(1, 1, 4), made.narrow(1, 6, 6)]
    apart = [part.contiguous(memory_format=memory_format) for part in parts]
    cells, expected_cells = (make_fields([0.3, 1.0], device) for _ in range(2))
    at = [0, 1], [2, 6], cells.alpha, 1
    result = ops.blend(y, parts, *at, cells.non_finite, cells.fault)
    expected = ops.blend(y, apart, *at, expected_cells.non_finite, expected_cells.fault)
    assert matches_storage(result, expected)
    assert cells.non_finite.tolist() == expected_cells.non_finite.tolist() == [1.0, 0.0]
    grads, expected_grads = (
        torch.ops.esper.blend_backward(y, y, outs, *at, [True] * 3) for outs in (parts, apart)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert matches_storage(grad, expected_grad)


def test_inputs_are_left_alone(device: str) -> None:
    y, out = torch.randn(4, 6, device=device), torch.randn(4, 2, device=device)
    before = y.clone(), out.clone()
    cells = make_cells(0.3, device)
    blend(y, out, cells, 1)
    assert torch.equal(y, before[0])
    assert torch.equal(out, before[1])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck(case: Case, in_place: bool, device: str) -> None:
    y, *outs = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in (case.shape, *case.out_shapes)
    )
    fields = fields_of(case, 0.3, device)

    def blend_one_by_one(y: Tensor, *outs: Tensor) -> Tensor:
        return blend_case(case, y * 1, outs, fields, in_place=in_place)

    torch.autograd.gradcheck(blend_one_by_one, (y, *outs))


def test_nan_in_out_poisons_no_gradient(device: str) -> None:
    y = torch.randn(3, 4, device=device, requires_grad=True)
    out = torch.full((3, 2), torch.nan, device=device, requires_grad=True)
    cells = make_cells(0.7, device)
    for result in (
        blend(y, out, cells, 1, 1),
        reference.blend(y, [out], [0], [1], cells.alpha, 1),
    ):
        grad_y, grad_out = torch.autograd.grad(result.sum(), (y, out))
        assert torch.equal(grad_y, torch.ones_like(y))
        assert torch.equal(grad_out, torch.zeros_like(out))


def test_arena_cells_may_change_before_backward(device: str) -> None:
    arena = torch.zeros(8, device=device)
    fault = torch.zeros(1, dtype=torch.uint8, device=device)
    arena[0] = 0.5
    y = torch.randn(4, device=device, requires_grad=True)
    out = torch.randn(4, device=device, requires_grad=True)
    result = ops.blend(y, [out], [0], [0], arena[0:1], 0, arena[1:2], fault)
    arena[2:].add_(1)
    grad_y, _ = torch.autograd.grad(result.sum(), (y, out))
    assert torch.equal(grad_y, torch.full_like(y, 0.5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("op", ["blend", "blend_", "blend_backward"])
def test_opcheck(op: str, layout: str, device: str) -> None:
    case = Case((3, 8, 5, 7), 1, (6, 1), (1, 4))
    y, outs, grad = samples(case, torch.float32, layout, device)
    fields = fields_of(case, 0.3, device)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    arguments = {
        "blend": (y, outs, *at, fields.non_finite, fields.fault),
        "blend_": (y, outs, *at, fields.non_finite, fields.fault),
        # opcheck takes NaN for a difference.
        "blend_backward": (reference.finite(grad), y, outs, *at, [True, False, True]),
    }
    # Gradients are attached by ops.blend, not at the dispatcher, so inputs here require none.
    torch.library.opcheck(getattr(torch.ops.esper, op), arguments[op])


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
    channel_dim = draw(st.integers(-len(shape), len(shape) - 1))
    borders = draw(st.lists(st.integers(0, shape[channel_dim]), min_size=2, max_size=8))
    borders = sorted(borders)[: len(borders) // 2 * 2]
    chunks = draw(st.permutations(list(zip(borders[::2], borders[1::2], strict=True))))
    starts = tuple(start for start, _ in chunks)
    return Case(shape, channel_dim, starts, tuple(end - start for start, end in chunks))


@given(
    case=any_case(),
    weight=st.floats(0, 1, width=32),
    layout=st.sampled_from(LAYOUTS),
    in_place=st.booleans(),
)
def test_any_shape(case: Case, weight: float, layout: str, in_place: bool) -> None:
    y, outs, _ = samples(case, torch.float32, layout)
    fields = fields_of(case, weight)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    expected = reference.blend(y.double(), in_double(outs), *at)
    result = blend_case(case, y, outs, fields, in_place=in_place)
    assert_close(result, expected, "blend")


def test_grad_alpha_is_the_same_for_any_number_of_threads() -> None:
    case = Case((700, 300), 1, (0, 50), (30, 200))
    y, outs, grad = samples(case, torch.float32, "contiguous")
    alpha = fields_of(case, 0.3).alpha
    single = native_backward(case, grad, y, outs, alpha)
    torch.set_num_threads(2)
    try:
        double = native_backward(case, grad, y, outs, alpha)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(single[-1], double[-1])


@pytest.mark.parametrize("weight", [0.3, 0.8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_two_bytes_is_rounded_as_torch_does(
    dtype: torch.dtype, weight: float
) -> None:
    """All 65,536 of them, denormal, infinite and NaN, through the conversions of the CPU's own."""
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = y[torch.randperm(len(y))]
    cells = make_cells(weight)
    result = blend(y, out, cells)
    expected = reference.blend(y, [out], [0], [0], cells.alpha, 0)
    same = (result.view(torch.int16) == expected.view(torch.int16)) | result.isnan()
    assert torch.equal(result.isnan(), expected.isnan())
    assert same.all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blend_counts_and_differentiates(backend: str, in_place: bool) -> None:
    torch.compiler.reset()
    case = Case((4, 6), 1, (3, 0), (2, 2))
    fields = fields_of(case, 0.3)
    y, outs, _ = samples(case, torch.float32, "contiguous")
    leaves = y.requires_grad_(), *(out.requires_grad_() for out in outs)

    def blended(y: Tensor, *outs: Tensor) -> Tensor:
        return blend_case(case, y * 2, outs, fields, in_place=in_place)

    result = torch.compile(blended, fullgraph=True, backend=backend)(*leaves)
    assert_counted(case, y, outs, fields)
    grads = torch.autograd.grad(result.square().sum(), leaves)
    eager = blended(*leaves)
    assert_close(result, eager.double(), "blend")
    expected = torch.autograd.grad(eager.square().sum(), leaves)
    assert_gradients_close(grads, expected)


def test_compiled_in_place_changes_y() -> None:
    torch.compiler.reset()
    cells = make_cells(0.25)
    y = torch.zeros(2)

    def blended(y: Tensor) -> Tensor:
        at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
        return ops.blend(y, [torch.ones(2)], *at, in_place=True)

    torch.compile(blended, fullgraph=True, backend="aot_eager")(y)
    assert y.tolist() == [0.25, 0.25]


def test_exported_blend_is_plain_pytorch() -> None:
    case = Case((4, 6), 1, (3, 0), (2, 2))

    class Blend(torch.nn.Module):
        def forward(self, y: Tensor, *outs: Tensor) -> Tensor:
            return blend_case(case, y, outs, fields_of(case, 0.3))

    inputs = torch.randn(4, 6), torch.randn(4, 2), torch.randn(4, 2)
    program = torch.export.export(Blend(), inputs)
    assert "esper" not in str(program.graph)
    assert_close(program.module()(*inputs), Blend()(*inputs).double(), "blend")


def test_compiled_blend_spares_the_seed_a_non_finite_gradient() -> None:
    torch.compiler.reset()
    cells = make_cells(0.25)
    out = torch.tensor([5.0, 5.0], requires_grad=True)

    def blended(y: Tensor, out: Tensor) -> Tensor:
        return blend(y, out, cells)

    result = torch.compile(blended, fullgraph=True, backend="aot_eager")(torch.ones(2), out)
    result.backward(torch.tensor([8.0, torch.inf]))
    assert out.grad is not None
    assert out.grad.tolist() == [2.0, 0.0]


WRONG = {
    "integers": (
        {"y": torch.zeros(4, 6, dtype=torch.int64)},
        r"y must be float32, float64, float16 or bfloat16, got Long",
    ),
    "out of another dtype": (
        {"outs": [torch.zeros(4, 2), torch.zeros(4, 1).double()]},
        r"outs\[1\] must be Float like y, got Double",
    ),
    "out of another rank": (
        {"outs": [torch.zeros(8), torch.zeros(4, 1)]},
        r"outs\[0\] must have y's shape \(4, 6, \) except",
    ),
    "out of another size": (
        {"outs": [torch.zeros(4, 2), torch.zeros(3, 1)]},
        r"outs\[1\] must have .* channel_dim 1, got \(3, 1, \)",
    ),
    "no outs": ({"outs": [], "seeds": [], "starts": []}, r"outs must have at least one tensor"),
    "too few seeds": (
        {"seeds": [0]},
        r"seeds and starts must be as many as the 2 outs, got 1 and 2",
    ),
    "too many starts": ({"starts": [0, 3, 5]}, r"as many as the 2 outs, got 2 and 3"),
    "seed out of range": (
        {"seeds": [0, 2]},
        r"seeds must lie in \[0, 2\), the length of alpha, got \[0, 2, \]",
    ),
    "negative seed": ({"seeds": [-1, 0]}, r"seeds must lie in \[0, 2\), .* got \[-1, 0, \]"),
    "seed named twice": ({"seeds": [1, 1]}, r"seeds must be distinct, got \[1, 1, \]"),
    "overlap": (
        {"starts": [1, 0], "outs": [torch.zeros(4, 2), torch.zeros(4, 3)]},
        r"outs must not overlap, but outs\[0\] begins at channel 1, before channel 3",
    ),
    "alpha of two dimensions": (
        {"alpha": torch.zeros(1, 2)},
        r"alpha must be contiguous with one element per seed, got shape \(1, 2, \)",
    ),
    "alpha with gaps": ({"alpha": torch.zeros(4)[::2]}, r"alpha must be contiguous"),
    "alpha of doubles": ({"alpha": torch.zeros(2).double()}, r"alpha must be Float, got Double"),
    "no such dimension": ({"channel_dim": 2}, r"channel_dim must be a dimension of y .*got 2"),
    "negative start": (
        {"starts": [-1, 3]},
        r"starts\[0\] must lie in \[0, 4\] for 2 channels of 6, got -1",
    ),
    "start too high": (
        {"starts": [0, 6]},
        r"starts\[1\] must lie in \[0, 5\] for 1 channels of 6, got 6",
    ),
    "fault of floats": ({"fault": torch.zeros(2)}, r"fault must be Byte, got Float"),
    "count of integers": (
        {"non_finite": torch.zeros(2, dtype=torch.int32)},
        r"non_finite must be Float, got Int",
    ),
    "too few counts": (
        {"non_finite": torch.zeros(1)},
        r"non_finite and fault must be as long as alpha, 2, got 1 and 2",
    ),
}


@pytest.mark.parametrize("op", ["blend", "blend_"])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(op: str, change: dict[str, object], message: str) -> None:
    fields = make_fields([0.3, 0.4])
    arguments = {
        "y": torch.zeros(4, 6),
        "outs": [torch.zeros(4, 2), torch.zeros(4, 1)],
        "seeds": [0, 1],
        "starts": [0, 3],
        "alpha": fields.alpha,
        "channel_dim": 1,
        "non_finite": fields.non_finite,
        "fault": fields.fault,
    }
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.esper, op)(**(arguments | change))


WRONG_IN_BACKWARD = {
    "grad of another shape": ({"grad": torch.zeros(3, 6)}, r"outs\[0\] must have grad's shape"),
    "y of another shape": (
        {"y": torch.zeros(4, 5)},
        r"y must have grad's shape \(4, 6, \), got \(4, 5, \)",
    ),
    "y of another dtype": ({"y": torch.zeros(4, 6).double()}, r"y must be Float, got Double"),
    "needs of too few": ({"needed": [True]}, r"needed must tell of y and each of the 1 outs"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_IN_BACKWARD.values(), ids=WRONG_IN_BACKWARD)
def test_wrong_arguments_in_backward(change: dict[str, object], message: str) -> None:
    arguments = {
        "grad": torch.zeros(4, 6),
        "y": None,
        "outs": [torch.zeros(4, 2)],
        "seeds": [0],
        "starts": [0],
        "alpha": torch.zeros(1),
        "channel_dim": 1,
        "needed": [True, True],
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esper.blend_backward(**(arguments | change))


@pytest.mark.cuda
def test_wrong_device() -> None:
    cells = make_cells(0.3)
    y = torch.zeros(4, 6, device="cuda")
    with pytest.raises(RuntimeError, match="on cuda:0"):
        blend(y, y, cells, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("in_place", [False, True])
def test_never_waits_for_the_device(in_place: bool) -> None:
    case = Case((64, 32), 1, (8, 0, 20), (8, 8, 4))
    y, outs, _ = samples(case, torch.float32, "contiguous", "cuda")
    fields = fields_of(case, 0.3, "cuda")
    y.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        blend_case(case, y * 1, outs, fields, in_place=in_place).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
