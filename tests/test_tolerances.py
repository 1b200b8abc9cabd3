"""The ruler itself: a deliberate error of 1 percent is caught in every dtype."""

import pytest
import torch
from tolerances import RELATIVE_NORM, assert_close, assert_sum_close


@pytest.mark.parametrize("dtype", RELATIVE_NORM)
def test_one_percent_fails_and_rounding_passes(dtype: torch.dtype) -> None:
    expected = torch.randn(1000, dtype=torch.float64)
    assert_close(expected.to(dtype), expected, "rounded")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close((expected * 1.01).to(dtype), expected, "wrong by 1 percent")


def test_a_nan_in_the_wrong_place_fails() -> None:
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="y: isnan differs"):
        assert_close(torch.tensor([1.0, torch.nan]), expected, "y")


def test_one_percent_of_a_cancelling_sum_fails() -> None:
    terms = torch.randn(1000, dtype=torch.float64)
    assert terms.sum().abs() < 0.1 * terms.abs().sum()
    assert_sum_close(terms.float().sum(), terms, "sum")
    with pytest.raises(AssertionError, match="sum: error"):
        assert_sum_close(1.01 * terms.float().sum(), terms, "sum")
