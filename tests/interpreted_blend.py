"""The Triton kernels under Triton's interpreter, on the CPU; run by test_triton_blend.py.

Not collected with the other tests: TRITON_INTERPRET has to be set before triton is imported.
"""

import pytest
import torch
from blend_cases import CASES, Case, laid_out, make_cells, samples
from tolerances import assert_close, assert_sum_close, matches_storage

from esper import ops, reference
from esper.kernels import blend as kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy's remark on NaN in lanes that are computed and then not selected.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# The interpreter truncates where a GPU rounds when it stores bfloat16, so that dtype is left to the
# CUDA variants of test_ops_blend.py.
DTYPES = (torch.float64, torch.float32, torch.float16)

# A program takes milliseconds here: one case of a few programs instead of those of many.
SMALL_CASES = (*CASES[:-2], Case((3, 701), 1, 100, 300))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype, layout: str, weight: float) -> None:
    y, out, grad = samples(case, dtype, layout)
    cells = make_cells(weight)
    at = (cells.alpha, case.channel_dim, case.start)
    result = kernels.blend(y, out, *at, cells.non_finite, cells.fault)
    grads = kernels.blend_backward(grad, y, out, *at)

    assert_close(result, reference.blend(y.double(), out.double(), *at), "blend")
    expected = reference.blend_backward(grad.double(), y.double(), out.double(), *at)
    assert_close(grads[0], expected[0], "grad_y")
    assert_close(grads[1], expected[1], "grad_out")
    chunk, act = (t.narrow(case.channel_dim, case.start, case.size).double() for t in (grad, y))
    sound = out.isfinite() & chunk.isfinite()
    terms = torch.where(sound, chunk * (out.double() - act), 0)
    assert_sum_close(grads[2], terms, "grad_alpha")
    lost = reference.blend_lost(y, out, case.channel_dim, case.start)
    assert cells.non_finite.item() == lost.item()
    assert cells.fault.item() == (lost.item() > 0)


def test_agrees_with_the_cpu_op_in_layout() -> None:
    for layout in ("contiguous", "channels_last", "transposed", "strided"):
        y, out, grad = samples(Case((3, 8, 5, 7), 1, 1, 4), torch.float32, layout)
        cells = make_cells(0.3)
        arguments = (y, out, cells.alpha, 1, 1)
        triton = kernels.blend(*arguments, cells.non_finite, cells.fault)
        native = ops.blend(*arguments, cells.non_finite, cells.fault)
        assert triton.stride() == native.stride()
        for mine, theirs in zip(
            kernels.blend_backward(grad, *arguments),
            torch.ops.esper.blend_backward(grad, *arguments),
            strict=True,
        ):
            assert mine.stride() == theirs.stride()


def test_ends_are_bit_exact() -> None:
    y = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -5.0])
    out = torch.tensor([-0.0, 0.0, 2.0, -3e38, 0.1])
    for weight, expected in ((0.0, y), (1.0, out)):
        cells = make_cells(weight)
        result = kernels.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
        assert matches_storage(result, expected)


def test_counts_only_what_the_kernel_broke() -> None:
    y = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    out = torch.tensor([torch.nan, torch.nan, torch.inf, 1.0])
    cells = make_cells(0.5)
    kernels.blend(y, out, cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert cells.non_finite.item() == 2
    cells.fault.zero_()
    kernels.blend(y[:1], out[:1], cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert cells.non_finite.item() == 3
    assert cells.fault.item() == 1
    cells.fault.zero_()
    kernels.blend(y[1:2], out[1:2], cells.alpha, 0, 0, cells.non_finite, cells.fault)
    assert cells.non_finite.item() == 3
    assert cells.fault.item() == 0


def test_a_non_finite_gradient_reaches_the_host_alone() -> None:
    inf = torch.inf
    y = torch.tensor([1.0, 2.0, 3.0, inf])
    out = torch.tensor([5.0, 5.0, inf, 5.0])
    grad = torch.tensor([8.0, inf, -inf, -inf])
    grads = kernels.blend_backward(grad, y, out, torch.tensor([0.25]), 0, 0)
    assert [t.tolist() for t in grads] == [[6.0, inf, -inf, -inf], [2.0, 0.0, 0.0, 0.0], [32.0]]


WRONG = {
    "integers": ({"y": torch.zeros(4, 6).int()}, r"y must be float32, .* got torch.int32"),
    "dtype": ({"out": torch.zeros(4, 2).double()}, r"out must be torch.float32 .* torch.float64"),
    "shape": ({"out": torch.zeros(3, 2)}, r"out must have y's shape \(4, 6\) .* got \(3, 2\)"),
    "rank": ({"out": torch.zeros(8)}, r"out must have y's shape \(4, 6\) .* got \(8,\)"),
    "dimension": ({"channel_dim": 2}, r"channel_dim must be a dimension of y .* got 2"),
    "start": ({"start": 5}, r"start must lie in \[0, 4\] for 2 channels of 6, got 5"),
    "alpha": ({"alpha": torch.zeros(2)}, r"alpha must have one element of torch.float32"),
    "fault": ({"fault": torch.zeros(1)}, r"fault must have one element of torch.uint8"),
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
    if "y" in change:
        change = change | {"out": torch.zeros(4, 2).int()}
    with pytest.raises(RuntimeError, match=message):
        kernels.blend(**(arguments | change))


def test_wrong_gradient() -> None:
    y = laid_out(torch.zeros(4, 6), "contiguous", 1)
    with pytest.raises(RuntimeError, match=r"grad must be like y, \(4, 6\) .* got \(4, 5\)"):
        kernels.blend_backward(torch.zeros(4, 5), y, y, torch.zeros(1), 1, 0)
