"""Makes rows of times: the ratios, differences and durations that all cases report."""

from collections.abc import Callable
from dataclasses import asdict

from benchmarks.harness import Estimate, Times
from benchmarks.rows import Baseline, Finding, Point

UNWRAPPED = "unwrapped"


def ratio(
    times: Times,
    work: str,
    baseline: str,
    row: str,
    *,
    diluted: float = 1.0,
    at_most: float | None = None,
    point: Point | None = None,
) -> Finding:
    """Return the ratio of the times of ``work`` and ``baseline``.

    ``diluted`` makes it the ratio that there would be if what ``work`` costs above the baseline
    were spent once in ``diluted`` times as many calls.
    """
    found = rescaled(times.ratio(work, baseline), lambda ratio: 1 + (ratio - 1) / diluted)
    return Finding(
        row=row,
        metric="time ratio",
        **asdict(found),
        unit="x",
        baseline=Baseline(name=baseline, value=times.median(baseline), unit="ns"),
        point=point,
        **_upper_bound(found, at_most, "x"),
    )


def added_ratio(
    times: Times, work: str, peer: str, baseline: str, row: str, *, at_most: float | None = None
) -> Finding:
    """Return what ``work`` adds to ``baseline`` by what ``peer`` adds to it."""
    found = times.added_ratio(work, peer, baseline)
    added_ns = times.median(peer) - times.median(baseline)
    return Finding(
        row=row,
        metric="ratio of added time",
        **asdict(found),
        unit="x",
        baseline=Baseline(name=f"added by {peer}", value=added_ns, unit="ns"),
        **_upper_bound(found, at_most, "x"),
    )


def duration(
    times: Times,
    work: str,
    row: str,
    *,
    unit: str = "ns",
    at_most: float | None = None,
    point: Point | None = None,
) -> Finding:
    """Return the time of one call, in ``unit``: ``ns`` or ``us``."""
    scale = {"ns": 1.0, "us": 1e-3}[unit]
    found = rescaled(times.time(work), lambda time_ns: time_ns * scale)
    return Finding(
        row=row,
        metric="time",
        **asdict(found),
        unit=unit,
        point=point,
        **_upper_bound(found, at_most, unit),
    )


def exact(
    row: str, metric: str, value: float, *, unit: str, at_most: float, point: Point | None = None
) -> Finding:
    """Return a number that does not vary."""
    return Finding(
        row=row,
        metric=metric,
        value=value,
        low=value,
        high=value,
        unit=unit,
        point=point,
        target=f"<= {at_most:,g} {unit}",
        met=value <= at_most,
    )


def rescaled(found: Estimate, scale: Callable[[float], float]) -> Estimate:
    """Apply an increasing linear function to an estimate."""
    q20, q80 = found.spread
    return Estimate(
        value=scale(found.value),
        low=scale(found.low),
        high=scale(found.high),
        spread=(scale(q20), scale(q80)),
        samples=found.samples,
    )


def _upper_bound(found: Estimate, at_most: float | None, unit: str) -> dict[str, str | bool]:
    if at_most is None:
        return {}
    return {"target": f"<= {at_most:,g} {unit}", "met": found.value <= at_most}
