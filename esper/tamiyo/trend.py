"""How the held-out loss moves: a slope, and how sure of it one can be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trend:
    """By which part of its size a loss falls over a window, and the standard error of that."""

    improvement: float
    standard_error: float


def fit_trend(losses: Sequence[float], window_epochs: int) -> Trend:
    """Fit a least-squares line through ``losses`` (two or more) and tell its fall over a window.

    The error is that of the residuals around the line, so two losses, which leave none, have an
    error of 0. Held-out losses of a run are taken on the same samples: the sampling error of each
    says little of how they move together.
    """
    n = len(losses)
    centre, mean, size = (n - 1) / 2, sum(losses) / n, sum(map(abs, losses)) / n
    if not size:
        return Trend(0.0, 0.0)
    spread = sum((x - centre) ** 2 for x in range(n))
    slope = sum((x - centre) * (y - mean) for x, y in enumerate(losses)) / spread
    residuals = sum((y - mean - slope * (x - centre)) ** 2 for x, y in enumerate(losses))
    error = math.sqrt(residuals / (n - 2) / spread) if n > 2 else 0.0
    unit = (window_epochs - 1) / size
    return Trend(0.0 - slope * unit, error * unit)


def plateau(
    losses: Sequence[float], window_epochs: int, least: float, standard_errors: float
) -> Trend | None:
    """Return the trend that shows that a window brings less than ``least``, or None.

    One window is looked at first, then twice and four times as much and so on: noise that hides the
    slope of a few epochs averages out over more, as the error of a slope falls with the length to
    the power of 3/2.
    """
    length = window_epochs
    while length <= len(losses):
        trend = fit_trend(losses[-length:], window_epochs)
        if trend.improvement + standard_errors * trend.standard_error < least:
            return trend
        length *= 2
    return None
