"""Tolerances are wide enough for rounding and too tight for one percent."""

import pytest
import torch
from torch import Tensor

from esper.urabrask.judge import TOLERANCES, Triple, compare, first_difference

DTYPES = {name: getattr(torch, name) for name in TOLERANCES}


def triple(dtype: torch.dtype, got: Tensor, reference: Tensor) -> Triple:
    """With a yardstick that is as exact as the dtype allows."""
    return Triple("out", got.to(dtype), reference, reference.to(dtype))


def verdict(name: str, got: Tensor, reference: Tensor) -> bool:
    case = triple(DTYPES[name], got, reference)
    return compare("forward", "a case", [case], TOLERANCES[name]).passed


@pytest.fixture
def reference() -> Tensor:
    return torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_allowed(name: str, reference: Tensor) -> None:
    assert verdict(name, reference, reference)
    assert verdict(name, reference.to(DTYPES[name]).sigmoid(), reference.sigmoid())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_is_not_allowed(name: str, factor: float, reference: Tensor) -> None:
    assert not verdict(name, reference * factor, reference)


def test_one_wrong_element_shows(reference: Tensor) -> None:
    wrong = reference.clone()
    wrong[3, 5] += 1e-4
    check = compare(
        "forward", "batch 32", [triple(torch.float32, wrong, reference)], TOLERANCES["float32"]
    )
    assert not check.passed
    assert check.reason.startswith("out is wrong at 1 of 512 elements, by up to ")
    assert check.reason.endswith(" is allowed (batch 32)")


def test_the_yardstick_widens_what_is_allowed() -> None:
    """A difference of large numbers: plain float32 has lost four digits, so may a kernel."""
    large = torch.full((8,), 1e4, dtype=torch.float64) + torch.arange(8) * 1e-4
    reference = large - 1e4
    yardstick = large.float() - 1e4
    got = reference + 1.5 * (yardstick - reference).abs().max() * torch.tensor([1.0, -1.0] * 4)
    check = compare(
        "forward", "a case", [Triple("out", got, reference, yardstick)], TOLERANCES["float32"]
    )
    assert not check.passed  # for the ceiling holds all the same
    assert "is off by" in check.reason
    milder = Triple("out", got.float() + 1e4, large, yardstick + 1e4)
    assert compare("forward", "a case", [milder], TOLERANCES["float32"]).passed


def test_relative_error_is_reported(reference: Tensor) -> None:
    check = compare(
        "forward",
        "a case",
        [triple(torch.float32, reference * 1.5, reference)],
        TOLERANCES["float32"],
    )
    assert check.numbers["relative_error"] == pytest.approx(0.5, rel=1e-5)


def test_bits_are_compared_and_not_values() -> None:
    zero = {"x": torch.zeros(1)}
    nan = {"x": torch.full((1,), torch.nan)}
    assert first_difference(zero, zero) is None
    assert first_difference(nan, nan) is None
    assert first_difference({"x": -torch.zeros(1)}, zero) == "x"
    assert first_difference({"x": torch.zeros(1, dtype=torch.int32)}, zero) == "x"
    assert first_difference({}, zero) == "x"
