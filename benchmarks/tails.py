"""Quantiles of single events: how long a thing takes that happens once, and how long at worst."""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import CONFIDENCE, RESAMPLES
from benchmarks.rows import Baseline, Finding

_SCALE = {"us": 1e-3, "ns": 1.0}


def quantile(
    row: str,
    times_ns: Sequence[float],
    percent: int,
    *,
    unit: str = "us",
    at_most: float | None = None,
) -> Finding:
    """Return a percentile of the events' times, with its percentile bootstrap interval."""
    return _finding(
        f"{row}, p{percent}", np.asarray(times_ns) * _SCALE[unit], percent, unit, at_most
    )


def ratio_of_medians(
    row: str,
    times_ns: Sequence[float],
    baseline: str,
    baseline_ns: Sequence[float],
    *,
    at_most: float | None = None,
) -> Finding:
    """Return the median of ``times_ns`` by the median of the baseline's."""
    median_ns = float(np.median(baseline_ns))
    found = _finding(row, np.asarray(times_ns) / median_ns, 50, "x", at_most)
    known = Baseline(name=baseline, value=median_ns, unit="ns")
    return found.model_copy(update={"baseline": known, "metric": "time ratio"})


def _finding(
    row: str, samples: np.ndarray, percent: int, unit: str, at_most: float | None
) -> Finding:
    rng = np.random.default_rng(0)
    resamples = max(1, min(RESAMPLES, 10**7 // len(samples)))
    drawn = np.percentile(rng.choice(samples, (resamples, len(samples))), percent, axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    value = float(np.percentile(samples, percent))
    q20, q80 = np.quantile(samples, (0.2, 0.8))
    return Finding(
        row=row,
        metric="time",
        value=value,
        low=min(value, float(low)),
        high=max(value, float(high)),
        spread=(float(q20), float(q80)),
        samples=len(samples),
        unit=unit,
        target=None if at_most is None else f"<= {at_most:,g} {unit}",
        met=None if at_most is None else value <= at_most,
    )
