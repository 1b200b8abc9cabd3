"""The cases by name. Each offers its trials; run.py and pytest-benchmark both time those."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.cases import (
    active,
    bandwidth,
    bank,
    compiled,
    dormant,
    forge,
    isolated,
    observed,
    telemetry,
)
from benchmarks.harness import Plan, Trial
from benchmarks.kernels import Kernels
from benchmarks.rows import Finding


def nothing(plan: Plan) -> Iterable[Finding]:
    return ()


@dataclass(frozen=True)
class Case:
    """``trials`` are timed; ``counts`` are numbers that no clock is needed for."""

    trials: Callable[[Plan, Kernels], list[Trial]]
    counts: Callable[[Plan], Iterable[Finding]] = nothing


CASES = {
    "dormant": Case(dormant.trials, dormant.counts),
    "observed": Case(observed.trials),
    "isolated": Case(isolated.trials),
    "active": Case(active.trials),
    "forge": Case(forge.trials),
    "bank": Case(bank.trials, bank.counts),
    "telemetry": Case(telemetry.trials, telemetry.counts),
    "compile": Case(compiled.trials, compiled.counts),
    "bandwidth": Case(bandwidth.trials),  # the last one, as it changes how memory is allocated
}
