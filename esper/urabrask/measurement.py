"""Times of a kernel from many short blocks, and whether they are worth deciding by.

A block is one question. It lasts long enough for the processor time that the operating system has
counted meanwhile to contradict the times that are told: what was computed took at least as long.
On CUDA, where it tells nothing of the device's work, the device's roofline does. The spread is that of the blocks' medians, kernel over eager, which share whatever
else the machine was doing.
"""

import math
import secrets
import statistics
from collections.abc import Callable, Sequence

from esper.config import EvaluatorSettings
from esper.contracts import Check, Measurement
from esper.urabrask.ledger import passed
from esper.urabrask.questions import Timed, TimeQuestion

_WARMUP_ROUNDS = 1  # of a block, not counted
_MOST_ROUNDS = 2000
_LEAST_CLAIM = 0.3  # of the processor time: the rest goes into inputs, and into the harness
_FRAMING_S = 0.005  # to read the question and to write the answer


Ask = Callable[[TimeQuestion], tuple[Timed, float]]


class ImplausibleError(Exception):
    """The times cannot be true; the message says why, in words that can stand in a report."""


class Benchmark:
    """Measures one kernel; ``ask`` puts a question to it, and returns the answer and the seconds
    of processor time that it took. No forward can be faster than ``floor_us``."""

    def __init__(self, settings: EvaluatorSettings, floor_us: float = 0.0) -> None:
        self._settings = settings
        self._floor_us = floor_us
        self._blocks: list[Timed] = []
        self._memory_bytes = 0
        self._repeated = 0

    def run(self, ask: Ask) -> None:
        """Measure until the spread is half of what is allowed, but no more than so many times.

        The steadiest measurement counts.
        """
        rounds = self._rounds_of_a_block(ask)
        profiled, _ = ask(_question(self._settings.timed_rounds, profiled=True))
        self._memory_bytes = profiled.memory_bytes
        self._blocks = self._measured(ask, rounds)
        while not self._is_steady and self._repeated < self._settings.measured_again:
            self._repeated += 1
            self._blocks = min(self._blocks, self._measured(ask, rounds), key=_spread)

    @property
    def decided(self) -> bool:
        """Whether the times are worth deciding by."""
        return self.spread <= self._settings.max_spread

    @property
    def _is_steady(self) -> bool:
        return self.spread <= self._settings.max_spread / 2

    @property
    def spread(self) -> float:
        """The range of the ratio to eager, over the blocks but the best and the worst."""
        return _spread(self._blocks)

    def check(self) -> Check:
        verdict = "decided" if self.decided else "undecided"
        count = len(self._blocks) * len(self._blocks[0].forward_us)
        return passed(
            "benchmark", f"{verdict} in {count} rounds", spread=self.spread, again=self._repeated
        )

    def measurement(self) -> Measurement:
        forward = _counted(self._blocks, "forward_us")
        forward_backward = _counted(self._blocks, "forward_backward_us")
        eager_forward = _counted(self._blocks, "eager_forward_us")
        eager_both = _counted(self._blocks, "eager_forward_backward_us")
        batch_size = self._settings.timed_batch_size
        return Measurement(
            batch_size=batch_size,
            forward_mean_us=statistics.fmean(forward),
            forward_p50_us=_median(forward),
            forward_p99_us=_percentile(forward, 0.99),
            forward_backward_mean_us=statistics.fmean(forward_backward),
            forward_backward_p50_us=_median(forward_backward),
            forward_backward_p99_us=_percentile(forward_backward, 0.99),
            eager_forward_p50_us=_median(eager_forward),
            eager_forward_backward_p50_us=_median(eager_both),
            samples_per_s=1e6 * batch_size / _median(forward_backward),
            spread=self.spread,
            memory_bytes=self._memory_bytes,
        )

    def _measured(self, ask: Ask, rounds: int) -> list[Timed]:
        return [self._plausible(ask, rounds) for _ in range(self._settings.timed_blocks)]

    def _rounds_of_a_block(self, ask: Ask) -> int:
        rounds = self._settings.timed_rounds
        while rounds < _MOST_ROUNDS:
            timed, _ = ask(_question(rounds))
            # By the shortest of each: what a busy machine adds to some must not make blocks short.
            least_us = sum(len(samples) * min(samples) for samples in timed.series)
            if least_us / 1e6 >= self._settings.timed_block_s:
                break
            rounds = min(2 * rounds, _MOST_ROUNDS)
        return rounds

    def _plausible(self, ask: Ask, rounds: int) -> Timed:
        """Return a block whose times account for the processor time that it took."""
        question = _question(rounds)
        timed, used_s = ask(question)
        if {len(samples) for samples in timed.series} != {question.rounds}:
            raise ImplausibleError(f"expected {question.rounds} samples of each latency")
        claimed_s = timed.total_us / 1e6
        if claimed_s < _LEAST_CLAIM * (used_s - _FRAMING_S):
            raise ImplausibleError(
                f"claims to have run for {claimed_s * 1e3:.1f} ms in "
                f"{used_s * 1e3:.1f} ms of processor time"
            )
        median_us = _median(timed.forward_us)
        if median_us < self._floor_us:
            raise ImplausibleError(
                f"claims a forward in {median_us:.2f} us, "
                f"which takes the device {self._floor_us:.2f} us at the very least"
            )
        return timed


def _question(rounds: int, *, profiled: bool = False) -> TimeQuestion:
    rounds += _WARMUP_ROUNDS
    return TimeQuestion(rounds=rounds, kept_round=secrets.randbelow(rounds), profiled=profiled)


def _spread(blocks: Sequence[Timed]) -> float:
    """Of ratios of lower quintiles, since what comes in the way only ever adds to a time."""
    ratios = sorted(
        _percentile(block.forward_us, 0.2) / _percentile(block.eager_forward_us, 0.2)
        for block in blocks
    )
    inner = ratios[1:-1]
    return (inner[-1] - inner[0]) / statistics.median(ratios)


def _counted(blocks: Sequence[Timed], name: str) -> list[float]:
    return [sample for block in blocks for sample in getattr(block, name)[_WARMUP_ROUNDS:]]


def _median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def _percentile(samples: Sequence[float], fraction: float) -> float:
    return sorted(samples)[math.ceil(fraction * len(samples)) - 1]
