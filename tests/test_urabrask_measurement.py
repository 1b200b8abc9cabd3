"""What is measured: a wide spread is repeated and then undecided, impossible times are refused."""

from collections.abc import Iterator
from itertools import cycle

import pytest

from esper.config import EvaluatorSettings
from esper.urabrask.measurement import Benchmark, ImplausibleError
from esper.urabrask.questions import Timed, TimeQuestion

SETTINGS = EvaluatorSettings(timed_rounds=5, timed_block_s=1e-6, timed_blocks=5, measured_again=2)


class Clock:
    """Answers with constant times; those of the kernel are ``forward_us``, one a block."""

    def __init__(self, forward_us: Iterator[float], *, used_s: float = 0.0) -> None:
        self._forward_us = forward_us
        self._used_s = used_s
        self.asked = 0

    def __call__(self, question: TimeQuestion) -> tuple[Timed, float]:
        self.asked += 1
        rounds = question.rounds
        timed = Timed(
            forward_us=(next(self._forward_us),) * rounds,
            forward_backward_us=(40.0,) * rounds,
            eager_forward_us=(10.0,) * rounds,
            eager_forward_backward_us=(50.0,) * rounds,
            memory_bytes=64 if question.profiled else 0,
        )
        return timed, self._used_s


def test_measures_each_latency() -> None:
    benchmark, clock = Benchmark(SETTINGS), Clock(cycle([8.0]))
    benchmark.run(clock)
    measured = benchmark.measurement()
    assert benchmark.decided
    assert clock.asked == 2 + SETTINGS.timed_blocks
    assert (measured.forward_mean_us, measured.forward_p50_us, measured.forward_p99_us) == (8, 8, 8)
    assert measured.forward_backward_p50_us == 40
    assert (measured.eager_forward_p50_us, measured.eager_forward_backward_p50_us) == (10, 50)
    assert measured.samples_per_s == pytest.approx(SETTINGS.timed_batch_size / 40e-6)
    assert measured.spread == 0
    assert measured.memory_bytes == 64


def test_one_disturbed_block_does_not_count() -> None:
    benchmark = Benchmark(SETTINGS)
    benchmark.run(Clock(iter([8.0, 8.0, 8.0, 80.0, 8.0, 8.0, 8.0])))
    assert benchmark.decided


def test_a_wide_spread_is_measured_again_and_then_undecided() -> None:
    benchmark, clock = Benchmark(SETTINGS), Clock(cycle([8.0, 80.0]))
    benchmark.run(clock)
    assert not benchmark.decided
    assert clock.asked == 2 + 3 * SETTINGS.timed_blocks
    assert benchmark.check().reason.startswith("undecided in ")
    assert benchmark.check().numbers["again"] == 2


def test_a_spread_that_narrows_is_decided() -> None:
    disturbed = [8.0, 8.0, *(8.0, 80.0, 800.0, 8.0, 80.0)]
    benchmark, clock = Benchmark(SETTINGS), Clock(iter([*disturbed, *[8.0] * 5]))
    benchmark.run(clock)
    assert benchmark.decided
    assert benchmark.measurement().forward_p99_us == 8


def test_the_steadiest_measurement_counts() -> None:
    """Each is decided, none is steady: 8 to 11, then 8 to 10.5, then 8 to 12 in the middle."""
    spreads = [
        (8.0, 8.0, 9.0, 11.0, 11.0),
        (8.0, 8.0, 9.0, 10.5, 11.0),
        (8.0, 8.0, 9.0, 12.0, 12.0),
    ]
    benchmark = Benchmark(SETTINGS)
    benchmark.run(Clock(iter([8.0, 8.0, *(time for times in spreads for time in times)])))
    assert benchmark.decided
    assert benchmark.check().numbers["again"] == 2
    assert benchmark.spread == pytest.approx(2.5 / 9)


def test_times_must_account_for_the_processor_time() -> None:
    with pytest.raises(ImplausibleError, match=r"claims to have run for 0\.6 ms in 100\.0 ms"):
        Benchmark(SETTINGS).run(Clock(cycle([8.0]), used_s=0.1))


def test_there_must_be_as_many_samples_as_rounds() -> None:
    def ask(question: TimeQuestion) -> tuple[Timed, float]:
        timed, used_s = Clock(cycle([8.0]))(question)
        return timed.model_copy(update={"forward_us": timed.forward_us[1:]}), used_s

    with pytest.raises(ImplausibleError, match="expected 6 samples of each latency"):
        Benchmark(SETTINGS).run(ask)


def test_a_busy_machine_does_not_make_blocks_short() -> None:
    """Else the harness's own share of the processor time would look like a lie."""
    settings = SETTINGS.model_copy(update={"timed_block_s": 0.01})
    clock = Clock(iter([8.0] * 100))
    asked: list[int] = []

    def ask(question: TimeQuestion) -> tuple[Timed, float]:
        asked.append(question.rounds)
        timed, used_s = clock(question)
        stalled = (timed.forward_us[0] + 20_000.0, *timed.forward_us[1:])
        return timed.model_copy(update={"forward_us": stalled}), used_s

    Benchmark(settings).run(ask)
    assert asked[-1] * (8 + 40 + 10 + 50) >= 1e4
