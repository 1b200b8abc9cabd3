"""The Triton kernels under Triton's interpreter, on the CPU; run by test_triton_bottleneck.py.

Not collected with the other tests: TRITON_INTERPRET has to be set before triton is imported.
"""

import pytest
import torch
from bottleneck_cases import CASES, Case, Sample, expected_grads, expected_result, make_sample
from tolerances import RELATIVE_NORM, assert_close, matches_storage, relative_error
from torch import Tensor

from esper import reference
from esper.kernels import bottleneck as kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy's remark on NaN in lanes that are computed and then not selected.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# The interpreter truncates where a GPU rounds when it stores bfloat16, so that dtype is left to the
# CUDA variants of test_ops_bottleneck.py.
DTYPES = (torch.float64, torch.float32, torch.float16)
PAIR = Case((5,), 7, 12, 3, 4, (4, 1), (8, 2))


def forward(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    y = sample.y.clone()
    hidden, lost = kernels.bottleneck_(
        y,
        sample.inp,
        *sample.weights,
        sample.code,
        *sample.sites,
        sample.bank.alpha,
        *sample.cells,
    )
    return y, hidden, lost


def backward(
    sample: Sample, hidden: Tensor, lost: Tensor | None, alpha: Tensor | None
) -> list[Tensor]:
    grad_inp, *grads = kernels.bottleneck_backward(
        sample.grad,
        sample.inp,
        hidden,
        lost,
        *sample.weights,
        sample.code,
        *sample.sites,
        alpha,
        *sample.cells,
        True,
        True,
    )
    given = zip(grads, sample.weights, strict=True)
    return [grad_inp, *(grad for grad, weight in given if weight is not None)]


def assert_grads_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, wanted in zip(actual, expected, strict=True):
        # In float16 several roundings follow each other, each within the limit.
        limit = RELATIVE_NORM[mine.dtype] * (1 if mine.element_size() > 2 else 3)
        assert mine.shape == wanted.shape
        assert relative_error(mine, wanted) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    sample = make_sample(case, dtype)
    y, hidden, lost = forward(sample)
    assert_close(y, expected_result(sample), "bottleneck")
    grads = backward(sample, hidden, lost, sample.bank.alpha)
    assert_grads_close(grads, expected_grads(sample))
    assert lost.item() == sample.bank.fault.sum().item() == 0


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for dtype in (torch.float64, torch.float32):
        sample = make_sample(PAIR, dtype, activation)
        y, hidden, lost = forward(sample)
        assert_close(y, expected_result(sample), activation)
        grads = backward(sample, hidden, lost, sample.bank.alpha)
        assert_grads_close(grads, expected_grads(sample))


def test_without_alpha_the_gradients_are_those_of_alpha_one() -> None:
    sample = make_sample(CASES[3])
    grads = backward(sample, forward(sample)[1], None, None)
    assert_grads_close(grads, expected_grads(sample, isolated=True))


def test_alpha_zero_is_the_host_bit_for_bit() -> None:
    sample = make_sample(PAIR, alpha=0.0)
    special = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, -torch.inf, 3e4])
    sample.y[:3] = special.repeat(2)
    assert matches_storage(forward(sample)[0], sample.y)


def test_what_the_branch_breaks_is_kept_counted_and_gets_no_gradient() -> None:
    sample = make_sample(PAIR, activation="identity")
    sample.inp[1, 0] = torch.nan
    sample.y[1, 2] = torch.inf  # the host's own, nobody's fault
    sample.grad[0, 3] = torch.inf
    y, hidden, lost = forward(sample)
    assert_close(y, expected_result(sample), "bottleneck")
    assert lost.item() == 8
    assert sample.bank.non_finite.tolist() == [0, 3, 0, 0, 4, 0]
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 1, 0]
    sample.bank.non_finite.zero_()
    sample.bank.fault.zero_()
    grads = backward(sample, hidden, lost, sample.bank.alpha)
    assert_grads_close(grads, [t.nan_to_num(0.0) for t in expected_grads(sample)])
    # NaN spreads to a column of down's gradient and to all of up's; inp's has its zeros.
    assert sample.bank.non_finite.tolist() == [0, 3 + 12, 0, 0, 3 + 12, 0]
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 1, 0]


WRONG = {
    "integers": ({"y": torch.zeros(5, 12).int()}, r"y must be float32, .* got torch.int32"),
    "dtype": (
        {"inp": torch.zeros(5, 7).double()},
        r"inp must .* of torch.float32 .* torch.float64",
    ),
    "rows": ({"inp": torch.zeros(4, 7)}, r"inp must have y's shape \(5, 12\) .*got \(4, 7\)"),
    "down": ({"down": torch.zeros(6, 8)}, r"down must have shape \(6, 7\) .*got shape \(6, 8\)"),
    "up": ({"up": torch.zeros(7, 3)}, r"up must have shape .* for 2 seeds, got \(7, 3\)"),
    "activation": ({"activation": 7}, r"activation must lie in \[0, 7\), got 7"),
    "start": ({"starts": [8, 9]}, r"starts must lie in \[0, 8\] for 4 channels of 12, got 9"),
    "starts": ({"starts": [8]}, r"one entry per seed, got 2 and 1"),
    "seed": ({"seeds": [4, 6]}, r"seeds must lie in \[0, 6\) of alpha, got 6"),
    "fault": ({"fault": torch.zeros(6)}, r"fault must have shape \(num_seeds,\) of torch.uint8"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    sample = make_sample(PAIR)
    arguments: dict[str, object] = {
        "y": sample.y,
        "inp": sample.inp,
        **sample.weights._asdict(),
        "activation": 0,
        "seeds": [4, 1],
        "starts": [8, 2],
        "alpha": sample.bank.alpha,
        "non_finite": sample.bank.non_finite,
        "fault": sample.bank.fault,
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.bottleneck_(**(arguments | change))
