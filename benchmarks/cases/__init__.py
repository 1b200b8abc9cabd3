"""The cases by name. Each offers its trials; run.py and pytest-benchmark both time those.

What cannot be repeated in rounds, or is asked for its tail, is measured by ``samples`` instead.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.cases import (
    active,
    bandwidth,
    bank,
    compiled,
    dormant,
    evaluate,
    forge,
    isolated,
    library,
    load,
    observed,
    stall,
    swap,
    telemetry,
)
from benchmarks.harness import Plan, Trial
from benchmarks.kernels import Kernels
from benchmarks.rows import Finding


def no_trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    return []


def nothing(plan: Plan) -> Iterable[Finding]:
    return ()


def no_samples(plan: Plan, kernels: Kernels) -> Iterable[Finding]:
    return ()


@dataclass(frozen=True)
class Case:
    """``trials`` are timed in rounds; ``counts`` are numbers that no clock is needed for.

    ``samples`` checks and times by itself, and raises WrongResultError before it has timed.
    """

    trials: Callable[[Plan, Kernels], list[Trial]] = no_trials
    counts: Callable[[Plan], Iterable[Finding]] = nothing
    samples: Callable[[Plan, Kernels], Iterable[Finding]] = no_samples


CASES = {
    "dormant": Case(dormant.trials, dormant.counts),
    "observed": Case(observed.trials),
    "isolated": Case(isolated.trials),
    "active": Case(active.trials),
    "forge": Case(forge.trials),
    "evaluate": Case(samples=evaluate.samples),
    "bank": Case(bank.trials, bank.counts),
    "telemetry": Case(telemetry.trials, telemetry.counts),
    "compile": Case(samples=compiled.samples),
    "load": Case(samples=load.samples),
    "swap": Case(samples=swap.samples),
    "stall": Case(samples=stall.samples),
    "library": Case(samples=library.samples),
    "bandwidth": Case(bandwidth.trials),  # the last one, as it changes how memory is allocated
}
