"""The suite through pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

It times the very works that run.py compares, one test each, grouped by trial.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES
from benchmarks.harness import Plan, Trial
from benchmarks.kernels import Kernels

pytestmark = pytest.mark.filterwarnings("default")  # what torch.compile and peers have to say
torch.set_num_threads(1)

PLAN = Plan(
    device=torch.device("cpu"), seed=0, rounds=100, trial_s=4.0, min_sample_ns=2e6, quick=False
)
KERNELS = Kernels(PLAN.device)
WORKS = [
    pytest.param(case, trial, work, id=f"{case} | {trial.name} | {work}")
    for case, offers in CASES.items()
    for trial in offers.trials(PLAN, KERNELS)
    for work in trial.works
]
checked: set[str] = set()  # names of trials


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> Iterator[None]:
    with KERNELS:
        yield


@pytest.mark.parametrize(("case", "trial", "work"), WORKS)
def test_case(benchmark: BenchmarkFixture, case: str, trial: Trial, work: str) -> None:
    benchmark.group = f"{case} | {trial.name}"
    if benchmark.group not in checked:
        trial.check()
        checked.add(benchmark.group)
    with torch.set_grad_enabled(trial.grad):
        benchmark(trial.works[work]())
