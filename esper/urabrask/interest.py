"""How unusual a kernel is, which makes the evaluator want its blueprint compiled with more care."""

import math
import statistics
from collections.abc import Callable, Sequence

from esper.contracts import UrabraskValidationReport

ENOUGH_PEERS = 8  # to say what is usual
_USUAL = 2.0  # standard deviations from the median
_UNHEARD_OF = 6.0
_LEAST_DEVIATION = 0.1  # of a logarithm: a tenth more or less is never unusual
_MAD_TO_STANDARD_DEVIATION = 1.4826  # of normally distributed numbers

Numbers = Callable[[UrabraskValidationReport], float | None]


def interest(
    report: UrabraskValidationReport, peers: Sequence[UrabraskValidationReport], novelty: float
) -> float:
    """Return ``surprise * (1 + novelty) / 2``, in [0, 1], to two decimals: 0 for the usual."""
    return round(surprise(report, peers) * (1 + novelty) / 2, 2)


def surprise(report: UrabraskValidationReport, peers: Sequence[UrabraskValidationReport]) -> float:
    """Return how far the report's numbers lie from those of its peers, in [0, 1].

    In ratio to eager, memory and drift, whichever is farthest: 0 up to two standard deviations of
    the logarithm, 1 from six on. Both middle and deviation are medians. 0 with fewer peers than
    :data:`ENOUGH_PEERS`.
    """
    if len(peers) < ENOUGH_PEERS:
        return 0.0
    return max(_deviation(numbers, report, peers) for numbers in (_speedup, _memory, _drift))


def _deviation(
    numbers: Numbers, report: UrabraskValidationReport, peers: Sequence[UrabraskValidationReport]
) -> float:
    own = numbers(report)
    others = [math.log(number) for peer in peers if (number := numbers(peer))]
    if not own or not others:
        return 0.0
    middle = statistics.median(others)
    spread = _MAD_TO_STANDARD_DEVIATION * statistics.median(abs(x - middle) for x in others)
    deviations = abs(math.log(own) - middle) / max(spread, _LEAST_DEVIATION)
    return min(1.0, max(0.0, (deviations - _USUAL) / (_UNHEARD_OF - _USUAL)))


def _speedup(report: UrabraskValidationReport) -> float | None:
    measured = report.measurement
    return measured.eager_forward_p50_us / measured.forward_p50_us if measured else None


def _memory(report: UrabraskValidationReport) -> float | None:
    return report.measurement.memory_bytes if report.measurement else None


def _drift(report: UrabraskValidationReport) -> float | None:
    return report.max_relative_error
