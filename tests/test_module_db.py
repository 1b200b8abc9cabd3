"""Every module of torch.nn, called as PyTorch's own tests call it, in a wrapped model."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("expecttest", reason="PyTorch's module database needs expecttest ([compat])")

from compat_cases import (
    NO_SEEDS,
    NOT_CALLABLE,
    Case,
    Holder,
    module_cases,
    module_names,
)
from compat_checks import active, autocast, culled, dormant_gradients, dormant_identical
from compat_runs import DoesNotApplyError
from compat_tools import compiled, exported, saved_and_loaded

from esper.kasmina.site_types import site_type

pytestmark = [
    # Modules warn of what they are about to deprecate, of slow paths and of odd arguments.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
]

CALLABLE_NAMES = module_names()


@functools.cache
def cases(name: str) -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module_cases(name)


def test_no_module_of_torch_nn_is_left_out() -> None:
    everything = {
        f"nn.{name}"
        for name, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    assert everything == {*CALLABLE_NAMES, *NOT_CALLABLE}


def test_all_but_the_exceptions_can_carry_seeds() -> None:
    without = {name for name in CALLABLE_NAMES if site_type(cases(name)[0].build().subject) is None}
    assert without == {*NO_SEEDS}


@pytest.mark.parametrize("name", CALLABLE_NAMES)
def test_a_module_with_dormant_seeds_is_bit_identical(name: str) -> None:
    for case in cases(name):
        dormant_identical(case)
        dormant_gradients(case)


@pytest.mark.parametrize("name", [name for name in CALLABLE_NAMES if name not in NO_SEEDS])
def test_a_kernel_on_a_module_learns_and_leaves_it_as_it_was(name: str) -> None:
    for case in cases(name):
        try:
            active(case)
        except DoesNotApplyError:  # called without a batch, as all modules are for some cases
            continue
        culled(case)
        return
    pytest.fail(f"no kernel ran on {name} in any of {len(cases(name))} cases")


@pytest.mark.parametrize("check", [autocast, saved_and_loaded, exported])
@pytest.mark.parametrize("name", CALLABLE_NAMES)
def test_what_is_done_with_models_works_with_a_module(
    name: str, check: Callable[[Case], None]
) -> None:
    if name == "nn.AdaptiveLogSoftmaxWithLoss" and check is autocast:
        pytest.skip("PyTorch itself cannot run it under autocast")
    run_first(check, name)


# Compiling takes seconds. One of each kind here, and all of them in tests/compat_report.py.
COMPILED_NAMES = [
    "nn.BatchNorm2d",
    "nn.Bilinear",
    "nn.Conv2d",
    "nn.ConvTranspose2d",
    "nn.Dropout",
    "nn.Embedding",
    "nn.GELU",
    "nn.LayerNorm",
    "nn.Linear",
    "nn.LSTM",
    "nn.MaxPool2d",
    "nn.MultiheadAttention",
    "nn.ReLU",
    "nn.TransformerEncoderLayer",
]


@pytest.mark.parametrize("name", COMPILED_NAMES)
def test_a_module_compiles_dormant_and_grown(name: str) -> None:
    run_first(compiled, name)


def run_first(check: Callable[[Case], None], name: str) -> None:
    """Run a check on the first case that it applies to."""
    for case in cases(name):
        with contextlib.suppress(DoesNotApplyError):
            check(case)
            return
    pytest.fail(f"{check.__name__} applied to {name} in none of {len(cases(name))} cases")


class Counting(nn.Linear):
    """Another output at each call, as of a layer that is not left alone."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x) * Counting.calls


@pytest.mark.parametrize(
    ("check", "what"),
    [
        (dormant_identical, "outputs"),
        (dormant_gradients, "gradients"),
        (autocast, "outputs"),
        (saved_and_loaded, "outputs"),
    ],
)
def test_the_checks_see_a_difference(check: Callable[[Case], None], what: str) -> None:
    [case] = cases("nn.LazyLinear")
    broken = dataclasses.replace(case, build=lambda: Holder(Counting(8, 6)))
    with pytest.raises(AssertionError, match=f"{what} 0"):
        check(broken)
