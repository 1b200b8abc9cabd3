"""Compares two pieces of work in pairs, and says how sure the result is.

Every round builds both anew and runs them A-B-B-A or B-A-A-B, so that neither a drift of the
machine nor the place where Python's objects happen to lie favours one of them.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.clocks import Clock, Work

Build = Callable[[], Work]
RESAMPLES = 10_000
# A case has about ten intervals that must all hold: at 95 % one run in three would show a row that
# is off by chance alone, at 99 % one in ten.
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Plan:
    """How a run measures."""

    device: torch.device
    seed: int
    rounds: int
    min_sample_ns: float  # far above the clock's resolution and the cost of reading it
    count_instructions: bool


@dataclass(frozen=True)
class Contest:
    """Two pieces of work to be compared, each made anew for every round."""

    baseline: Build
    variant: Build


@dataclass(frozen=True)
class Estimate:
    """A median with its confidence interval, and the samples' 20% and 80% quantiles."""

    value: float
    low: float
    high: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    ratio: Estimate  # variant / baseline
    baseline_ns: float  # median per call


def compare(
    contests: Mapping[str, Contest], clock: Clock, plan: Plan, rng: np.random.Generator
) -> dict[str, Comparison]:
    """Run all contests, interleaved, and return what came of each."""
    first_work = next(iter(contests.values())).baseline()
    repeats = repeats_needed(first_work, clock, plan.min_sample_ns)
    orders = {name: balanced_orders(plan.rounds, rng) for name in contests}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contests}
    with no_garbage_collection():
        for number in range(plan.rounds):
            for name in rng.permutation(list(contests)):
                pair = paired_sample(contests[name], orders[name][number], clock, repeats)
                samples[name].append(pair)
                gc.collect()  # what the round built
    return {name: _summarize(pairs, rng) for name, pairs in samples.items()}


def measure(work: Work, clock: Clock, plan: Plan, rng: np.random.Generator) -> Estimate:
    """Return the nanoseconds that one call takes by itself."""
    repeats = repeats_needed(work, clock, plan.min_sample_ns)
    with no_garbage_collection():
        return estimate([clock.time_ns(work, repeats) for _ in range(plan.rounds)], rng)


def paired_sample(
    contest: Contest, baseline_first: bool, clock: Clock, repeats: int
) -> tuple[float, float]:
    """Return the times of baseline and variant, each the mean of two samples."""
    builds = (contest.baseline, contest.variant)
    outer, inner = (build() for build in (builds if baseline_first else builds[::-1]))
    for work in (outer, inner):
        clock.time_ns(work, repeats)  # warms up
    first, second, third, fourth = (
        clock.time_ns(work, repeats) for work in (outer, inner, inner, outer)
    )
    times = ((first + fourth) / 2, (second + third) / 2)
    return times if baseline_first else times[::-1]


def balanced_orders(rounds: int, rng: np.random.Generator) -> list[bool]:
    """Return, in random order, whether the baseline comes first: in half of the rounds it does."""
    return [bool(number % 2) for number in rng.permutation(rounds)]


def repeats_needed(work: Work, clock: Clock, min_sample_ns: float) -> int:
    """Return how many calls make a sample of at least ``min_sample_ns``."""
    repeats = 1
    while clock.time_ns(work, repeats) * repeats < min_sample_ns:
        repeats *= 2
    return repeats


def estimate(samples: Sequence[float], rng: np.random.Generator) -> Estimate:
    """Return the median with its percentile bootstrap interval."""
    values = np.asarray(samples)
    medians = np.median(rng.choice(values, (RESAMPLES, len(values))), axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    q20, q80 = np.quantile(values, (0.2, 0.8))
    return Estimate(float(np.median(values)), float(low), float(high), (float(q20), float(q80)))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running within a sample, and make calling it by hand cheap."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _summarize(pairs: Sequence[tuple[float, float]], rng: np.random.Generator) -> Comparison:
    ratios = [variant / baseline for baseline, variant in pairs]
    return Comparison(estimate(ratios, rng), float(np.median([base for base, _ in pairs])))
