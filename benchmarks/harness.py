"""Times pieces of work in rounds, and says how sure the result is.

Every round builds all of them anew and runs them in one order and then in the reverse (A-B-C-C-B-A),
so that neither a drift of the machine nor the place where Python's objects happen to lie favours
one of them.
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.clocks import Clock, ThreadClock, Work, clock_for
from benchmarks.rows import Finding

Build = Callable[[], Work]
Samples = NDArray[np.float64]  # one number a round

RESAMPLES = 10_000
# A case has dozens of intervals that must all hold: at 95 % one row in twenty would be off by
# chance alone, at 99 % one in a hundred.
CONFIDENCE = 0.99
MIN_ROUNDS = 10  # even where they take longer than a trial should


@dataclass(frozen=True)
class Plan:
    """How a run measures."""

    device: torch.device
    seed: int
    rounds: int  # at most, per trial
    trial_s: float  # after which a trial of ordinary length ends, whatever the machine
    min_sample_ns: float  # far above the clock's resolution and the cost of reading it
    quick: bool  # see that everything runs, on few and small things


@dataclass(frozen=True)
class Estimate:
    """A median with its confidence interval, and the samples' 20% and 80% quantiles."""

    value: float
    low: float
    high: float
    spread: tuple[float, float]
    samples: int


@dataclass(frozen=True)
class Times:
    """Nanoseconds per call of each work, in each round."""

    of: Mapping[str, Samples]
    rng: np.random.Generator

    def time(self, work: str) -> Estimate:
        return estimate(self.of[work], self.rng)

    def ratio(self, work: str, baseline: str) -> Estimate:
        return estimate(self.of[work] / self.of[baseline], self.rng)

    def added_ratio(self, work: str, peer: str, baseline: str) -> Estimate:
        """Relate what ``work`` costs above ``baseline`` to what ``peer`` does."""
        added, peers = (self.of[name] - self.of[baseline] for name in (work, peer))
        return estimate(added / peers, self.rng)

    def median(self, work: str) -> float:
        return float(np.median(self.of[work]))


@dataclass(frozen=True)
class Trial:
    """Pieces of work that are timed against one another, and what is found in their times.

    ``check`` raises :class:`benchmarks.gate.WrongResultError` unless all works compute what they
    should. ``length`` is the time that the trial may take, relative to ordinary ones.
    """

    name: str
    works: Mapping[str, Build]
    check: Callable[[], None]
    report: Callable[[Times], Iterable[Finding]]
    grad: bool = False
    length: float = 1.0
    on_host: bool = False  # time the host whatever the device
    clock: Clock | None = None  # instead of the device's


def measure(
    trial: Trial, plan: Plan, rng: np.random.Generator, clock: Clock | None = None
) -> Times:
    """Run the trial's works in rounds, until there are enough of them or its time is over."""
    clock = clock or trial.clock
    if clock is None:
        clock = ThreadClock() if trial.on_host else clock_for(plan.device)
    samples: dict[str, list[float]] = {name: [] for name in trial.works}
    with torch.set_grad_enabled(trial.grad), no_garbage_collection():
        first_work = next(iter(trial.works.values()))()
        repeats = repeats_needed(first_work, clock, plan.min_sample_ns)
        end = time.monotonic() + plan.trial_s * trial.length
        for number, order in enumerate(orders(list(trial.works), plan.rounds, rng)):
            if number >= MIN_ROUNDS and time.monotonic() > end:
                break
            builds = {name: trial.works[name] for name in order}
            for name, time_ns in one_round(builds, clock, repeats).items():
                samples[name].append(time_ns)
            gc.collect()  # what the round built
    return Times({name: np.asarray(times) for name, times in samples.items()}, rng)


def one_round(builds: Mapping[str, Build], clock: Clock, repeats: int) -> dict[str, float]:
    """Return the time of each work, the mean of one sample on the way there and one back."""
    works = {name: build() for name, build in builds.items()}
    for work in works.values():
        clock.time_ns(work, repeats)  # warms up
    there = {name: clock.time_ns(work, repeats) for name, work in works.items()}
    back = {name: clock.time_ns(works[name], repeats) for name in reversed(works)}
    return {name: (there[name] + back[name]) / 2 for name in works}


def orders(works: Sequence[str], rounds: int, rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield an order for each round: random, but every work takes every place equally often."""
    return itertools.islice(_latin_squares(works, rng), rounds)


def _latin_squares(works: Sequence[str], rng: np.random.Generator) -> Iterator[list[str]]:
    while True:
        shuffled = [works[place] for place in rng.permutation(len(works))]
        for shift in rng.permutation(len(works)):
            yield [*shuffled[shift:], *shuffled[:shift]]


def repeats_needed(work: Work, clock: Clock, min_sample_ns: float) -> int:
    """Return how many calls make a sample of at least ``min_sample_ns``."""
    clock.time_ns(work, 1)  # the first call may compile, allocate or import something
    repeats = 1
    while clock.time_ns(work, repeats) * repeats < min_sample_ns:
        repeats *= 2
    return repeats


def estimate(samples: Samples, rng: np.random.Generator) -> Estimate:
    """Return the median with its percentile bootstrap interval."""
    medians = np.median(rng.choice(samples, (RESAMPLES, len(samples))), axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    q20, q80 = np.quantile(samples, (0.2, 0.8))
    spread = (float(q20), float(q80))
    return Estimate(float(np.median(samples)), float(low), float(high), spread, len(samples))


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
