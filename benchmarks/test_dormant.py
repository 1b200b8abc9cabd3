"""The dormant case through pytest-benchmark: ``pytest benchmarks/ --benchmark-only``."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases.dormant import MODES, Mode, check
from benchmarks.models import SUITE, Subject, unwrapped, wrapped

torch.set_num_threads(1)
CPU, SEED = torch.device("cpu"), 0


@pytest.mark.parametrize("variant", ["unwrapped", "wrapped"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("subject", SUITE, ids=lambda subject: subject.name)
def test_dormant(benchmark: BenchmarkFixture, subject: Subject, mode: Mode, variant: str) -> None:
    check(subject, CPU, SEED)
    net, inp = subject.prepare(CPU, SEED)
    model = unwrapped(net) if variant == "unwrapped" else wrapped(net, inp)
    benchmark.group = f"{subject.name}, {mode.name}"
    with torch.set_grad_enabled(mode.grad):
        benchmark(mode.work(model, inp))
