"""The Triton kernels under Triton's interpreter, on the CPU; run by test_triton_blend.py.

Not collected with the other tests: TRITON_INTERPRET has to be set before triton is imported.
"""

from collections.abc import Sequence

import pytest
import torch
from blend_cases import CASES, Case, Fields, fields_of, make_cells, samples
from tolerances import assert_close, assert_sum_close, matches_storage
from torch import Tensor

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
FEW_PROGRAMS = (*CASES[:-2], Case((3, 701), 1, (400, 100), (77, 300)))


def blend(case: Case, y: Tensor, outs: Sequence[Tensor], fields: Fields) -> Tensor:
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    return kernels.blend(y, outs, *at, fields.non_finite, fields.fault)


def assert_grad_alpha_close(
    case: Case, actual: Tensor, grad: Tensor, y: Tensor, outs: Sequence[Tensor]
) -> None:
    for out, seed, start in zip(outs, case.seeds, case.starts, strict=True):
        size = out.size(case.channel_dim)
        chunk, act = (t.narrow(case.channel_dim, start, size).double() for t in (grad, y))
        sound = out.isfinite() & chunk.isfinite()
        terms = torch.where(sound, chunk * (out.double() - act), 0)
        assert_sum_close(actual[seed], terms, f"grad_alpha[{seed}]")
    assert actual[1] == 0  # seed 1 is not named


@pytest.mark.parametrize("weight", [0.3, 0.8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW_PROGRAMS, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype, layout: str, weight: float) -> None:
    y, outs, grad = samples(case, dtype, layout)
    wide_y, wide_grad, *wide_outs = (t.double() for t in (y, grad, *outs))
    fields = fields_of(case, weight)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    result = blend(case, y, outs, fields)
    assert_close(result, reference.blend(wide_y, wide_outs, *at), "blend")
    lost = reference.blend_lost(y, outs, case.seeds, case.starts, case.channel_dim, fields.alpha)
    assert fields.non_finite.tolist() == lost.tolist()
    assert fields.fault.tolist() == (lost > 0).tolist()

    needed = [True] * (1 + len(outs))
    *grads, grad_alpha = kernels.blend_backward(grad, y, outs, *at, needed)
    expected = reference.blend_backward(wide_grad, None, wide_outs, *at, needed)
    for i, (mine, wanted) in enumerate(zip(grads, expected, strict=True)):
        assert_close(mine, wanted, f"gradient {i} of y and outs")
    assert_grad_alpha_close(case, grad_alpha, grad, y, outs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("case", FEW_PROGRAMS, ids=str)
def test_in_place_is_the_same(case: Case, layout: str) -> None:
    y, outs, _ = samples(case, torch.float32, layout)
    fields, twin = fields_of(case, 0.3), fields_of(case, 0.3)
    expected = blend(case, y, outs, twin)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    kernels.blend_(y, outs, *at, fields.non_finite, fields.fault)
    assert matches_storage(y, expected)
    assert torch.equal(fields.non_finite, twin.non_finite)
    assert torch.equal(fields.fault, twin.fault)


@pytest.mark.parametrize(("num_outs", "expected"), [(1, [1]), (8, [8]), (9, [8, 1])])
def test_up_to_eight_seeds_take_one_launch(
    num_outs: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []
    run = kernels._Launch.run

    def counted(launch: kernels._Launch, *args: object, **kwargs: object) -> None:
        launches.append(len(launch.segments))
        run(launch, *args, **kwargs)

    monkeypatch.setattr(kernels._Launch, "run", counted)
    case = Case((2, 20), 1, tuple(range(1, 1 + 2 * num_outs, 2)), (1,) * num_outs)
    y, outs, grad = samples(case, torch.float32, "contiguous")
    fields = fields_of(case, 0.3)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    blend(case, y, outs, fields)
    kernels.blend_(y, outs, *at, fields.non_finite, fields.fault)
    kernels.blend_backward(grad, None, outs, *at, [True] * (1 + len(outs)))
    assert launches == expected * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_agrees_with_the_cpu_op_in_layout(layout: str) -> None:
    case = Case((3, 8, 5, 7), 1, (6, 1), (1, 4))
    y, outs, grad = samples(case, torch.float32, layout)
    fields = fields_of(case, 0.3)
    at = case.seeds, case.starts, fields.alpha, case.channel_dim
    native = ops.blend(y, outs, *at, fields.non_finite, fields.fault)
    assert blend(case, y, outs, fields).stride() == native.stride()
    backward = grad, y, outs, *at, [True] * 3
    for mine, theirs in zip(
        kernels.blend_backward(*backward), torch.ops.esper.blend_backward(*backward), strict=True
    ):
        assert mine.stride() == theirs.stride()


def test_backward_returns_what_is_needed_and_no_more() -> None:
    case = Case((3, 8), 1, (5, 0), (2, 3))
    y, outs, grad = samples(case, torch.float32, "contiguous")
    at = case.seeds, case.starts, fields_of(case, 0.3).alpha, case.channel_dim
    grad_y, first, second, grad_alpha = kernels.blend_backward(grad, y, outs, *at, [True] * 3)
    for needed, expected in (
        ([True, False, False], [grad_y]),
        ([False, True, True], [first, second]),
        ([False, False, True], [second]),
    ):
        for host, more in ((None, []), (y, [grad_alpha])):
            grads = kernels.blend_backward(grad, host, outs, *at, needed)
            for mine, wanted in zip(grads, [*expected, *more], strict=True):
                assert matches_storage(mine, wanted)


def test_ends_are_bit_exact() -> None:
    y = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -5.0])
    out = torch.tensor([-0.0, 0.0, 2.0, -3e38, 0.1])
    for weight, expected in ((0.0, y), (1.0, out)):
        cells = make_cells(weight)
        at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
        assert matches_storage(kernels.blend(y, [out], *at), expected)


def test_counts_only_what_the_kernel_broke() -> None:
    y = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    out = torch.tensor([torch.nan, torch.nan, torch.inf, 1.0])
    cells = make_cells(0.5)
    at = [0], [0], cells.alpha, 0, cells.non_finite, cells.fault
    kernels.blend(y, [out], *at)
    assert cells.non_finite.item() == 2
    cells.fault.zero_()
    kernels.blend(y[:1], [out[:1]], *at)
    assert cells.non_finite.item() == 3
    assert cells.fault.item() == 1
    cells.fault.zero_()
    kernels.blend(y[1:2], [out[1:2]], *at)
    assert cells.non_finite.item() == 3
    assert cells.fault.item() == 0


def test_a_non_finite_gradient_reaches_the_host_alone() -> None:
    inf = torch.inf
    y = torch.tensor([1.0, 2.0, 3.0, inf])
    out = torch.tensor([5.0, 5.0, inf, 5.0])
    grad = torch.tensor([8.0, inf, -inf, -inf])
    at = [0], [0], torch.tensor([0.25]), 0
    grads = kernels.blend_backward(grad, y, [out], *at, [True, True])
    assert [t.tolist() for t in grads] == [[6.0, inf, -inf, -inf], [2.0, 0.0, 0.0, 0.0], [32.0]]


TWO = torch.zeros(4, 2)
WRONG = {
    "integers": ({"y": torch.zeros(4, 6).int()}, r"y must be float32, .* got torch.int32"),
    "dtype": (
        {"outs": [TWO, TWO.double()]},
        r"outs\[1\] must be torch.float32 .* torch.float64",
    ),
    "shape": (
        {"outs": [TWO, torch.zeros(3, 2)]},
        r"outs\[1\] must have y's shape \(4, 6\) .* got \(3, 2\)",
    ),
    "rank": (
        {"outs": [torch.zeros(8), TWO]},
        r"outs\[0\] must have y's shape \(4, 6\) .* got \(8,\)",
    ),
    "dimension": ({"channel_dim": 2}, r"channel_dim must be a dimension of y .* got 2"),
    "start": (
        {"starts": [0, 5]},
        r"starts\[1\] must lie in \[0, 4\] for 2 channels of 6, got 5",
    ),
    "overlap": (
        {"starts": [2, 1]},
        r"outs must not overlap, but outs\[0\] begins at channel 2, before channel 3",
    ),
    "no outs": ({"outs": [], "seeds": [], "starts": []}, r"outs must have at least one tensor"),
    "seeds": ({"seeds": [0]}, r"seeds and starts must be as many as the 2 outs, got 1 and 2"),
    "range": ({"seeds": [0, 2]}, r"seeds must lie in \[0, 2\), .* got \[0, 2\]"),
    "twice": ({"seeds": [1, 1]}, r"seeds must be distinct, got \[1, 1\]"),
    "alpha": ({"alpha": torch.zeros(2, 1)}, r"alpha must be contiguous with one element per seed"),
    "fault": ({"fault": torch.zeros(2)}, r"fault must be torch.uint8 on cpu, got torch.float32"),
    "counts": (
        {"non_finite": torch.zeros(1)},
        r"non_finite and fault must be as long as alpha, 2, got 1 and 2",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    fields = fields_of(Case((4, 6), 1, (0,), (1,)), 0.3)
    arguments = {
        "y": torch.zeros(4, 6),
        "outs": [TWO, TWO],
        "seeds": [0, 1],
        "starts": [0, 3],
        "alpha": fields.alpha,
        "channel_dim": 1,
        "non_finite": fields.non_finite,
        "fault": fields.fault,
    }
    for op in (kernels.blend, kernels.blend_):
        with pytest.raises(RuntimeError, match=message):
            op(**(arguments | change))


def test_wrong_arguments_in_backward() -> None:
    grad, at = torch.zeros(4, 6), ([0], [0], torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match=r"y must be like grad, \(4, 6\) .* got \(4, 5\)"):
        kernels.blend_backward(grad, torch.zeros(4, 5), [TWO], *at, [True, True])
    with pytest.raises(RuntimeError, match="needed must tell of y and each of the 1 outs, got 1"):
        kernels.blend_backward(grad, None, [TWO], *at, [True])
