"""Geometry of the report's drawings; every position is in percent of the plot's width or height.

Percentages let one drawing serve a phone and a printed page: lines are stretched with the plot,
while the labels are text beside it and keep their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

from esper.contracts import LifecycleEvent, SeedId, SeedState
from esper.nissa.formats import seed_label
from esper.nissa.record import RunRecord

Point = tuple[float, float]

_MAX_TICKS = 8
_MAX_POINTS = 400  # of a line; longer ones are drawn as means over equal runs of points
_LOGARITHMIC_FROM = 5  # the ratio of largest to smallest value
_VISIBLE_ALPHA = 0.01  # a smaller change is about a pixel
_MARKER_GAP = 6.5  # percent; the width of a marker on a plot of 320 pixels
_MARKED = {
    SeedState.GERMINATED: "germinated",
    SeedState.GRAFTING: "starts to be blended in",
    SeedState.FOSSILIZED: "kept for good",
    SeedState.CULLED: "removed",
    SeedState.CANCELLED: "cancelled",
    SeedState.ROLLED_BACK: "rolled back",
}


class Tick(NamedTuple):
    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Maps values to percent; values outside are drawn at the edge."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (self._warp(x) for x in (self.low, self.high, value))
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    def ticks(self) -> list[Tick]:
        values = (
            _decade_ticks(self.low, self.high)
            if self.logarithmic
            else _even_ticks(self.low, self.high)
        )
        return [Tick(self.at(value), f"{value:.7g}") for value in values]

    def _warp(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


class Line(NamedTuple):
    label: str
    style: str  # CSS classes
    path: str


class Chart(NamedTuple):
    title: str
    y_ticks: list[Tick]
    lines: list[Line]
    left_out: int  # values that are not finite


class Marker(NamedTuple):
    """A numbered event; ``row`` stacks those that would cover each other."""

    number: int
    at: float
    row: int
    text: str
    event: LifecycleEvent


class Span(NamedTuple):
    """The time that a seed spent in one state."""

    left: float
    width: float
    state: SeedState


class Series(NamedTuple):
    label: str
    style: str
    points: list[Point]  # (step, value)


def step_scale(record: RunRecord) -> Scale:
    """The horizontal axis that all drawings of a run share: optimizer steps."""
    steps = (
        *(entry.step for entry in record.step_losses),
        *(event.step for event in record.epochs),
        *(event.step for event in record.lifecycle),
        *(step for series in record.alphas for step, _ in series.points),
    )
    return Scale(0, max((1, *steps)))


def epoch_ticks(record: RunRecord, x: Scale) -> list[Tick]:
    """Mark where epochs begin, so that what happens in an epoch stands to the right of it."""
    stride = math.ceil(_nice(len(record.epochs) / _MAX_TICKS))
    starts = [0, *(event.step for event in record.epochs)]
    return [
        Tick(x.at(start), str(event.epoch))
        for start, event in zip(starts, record.epochs, strict=False)
        if event.epoch % stride == 0
    ]


def loss_chart(record: RunRecord, x: Scale) -> Chart | None:
    steps = [(float(entry.step), entry.loss) for entry in record.step_losses]
    run = _run_length(steps)
    series = [
        Series(
            "training, each step" if run == 1 else f"training, mean of {run} steps", "step", steps
        ),
        Series("training, epoch", "train", [(e.step, e.train_loss) for e in record.epochs]),
        Series("validation, epoch", "val", [(e.step, e.val_loss) for e in record.epochs]),
    ]
    return _chart("Loss", series, x)


def accuracy_chart(record: RunRecord, x: Scale) -> Chart | None:
    points = [
        (float(event.step), 100 * event.val_accuracy)
        for event in record.epochs
        if event.val_accuracy is not None
    ]
    if not points:
        return None
    around = _linear_around([accuracy for _, accuracy in points])
    y = Scale(max(around.low, 0), min(around.high, 100))
    return _chart("Accuracy in percent", [Series("validation, epoch", "val", points)], x, y)


def alpha_chart(record: RunRecord, x: Scale) -> Chart | None:
    """How far each seed was blended into its layer: 0 is the layer alone, 1 the kernel's output."""
    y = Scale(0, 1)
    lines = [
        Line(
            seed_label(alphas.seed_id),
            f"seed-{i % 6} dash-{i // 6 % 3}",
            "".join(_path(_outline(stay), x, y) for stay in _stays(alphas.points)),
        )
        for i, alphas in enumerate(record.alphas)
    ]
    return Chart("Alpha, how far a kernel is blended in", y.ticks(), lines, 0) if lines else None


def markers(record: RunRecord, x: Scale) -> list[Marker]:
    """Number the events that change what the network computes, in the order of time."""
    events = sorted((e for e in record.lifecycle if e.target in _MARKED), key=lambda e: e.step)
    ends: list[float] = []  # of the last marker in each row
    placed: list[Marker] = []
    for event in events:
        at = x.at(event.step)
        row = next((i for i, end in enumerate(ends) if at - end >= _MARKER_GAP), len(ends))
        ends[row : row + 1] = [at]
        placed.append(Marker(len(placed) + 1, at, row, _MARKED[event.target], event))
    return placed


def timelines(record: RunRecord, x: Scale) -> list[tuple[SeedId, list[Span]]]:
    """Return the states of every seed that ever woke, in the order in which they did."""
    events: dict[SeedId, list[LifecycleEvent]] = {}
    for event in record.lifecycle:
        events.setdefault(event.seed_id, []).append(event)
    return [(seed_id, _spans(edges, x)) for seed_id, edges in events.items()]


def _spans(edges: list[LifecycleEvent], x: Scale) -> list[Span]:
    lefts = [x.at(edge.step) for edge in edges]
    return [
        Span(left, round(right - left, 2), edge.target)
        for edge, (left, right) in zip(edges, pairwise([*lefts, 100.0]), strict=True)
        if edge.target is not SeedState.DORMANT
    ]


def _chart(title: str, series: list[Series], x: Scale, y: Scale | None = None) -> Chart | None:
    drawn = [entry._replace(points=_thinned(entry.points)) for entry in series if entry.points]
    values = [value for entry in drawn for _, value in entry.points if math.isfinite(value)]
    if not values:
        return None
    y = y or _scale_around(values)
    lines = [Line(entry.label, entry.style, _path(entry.points, x, y)) for entry in drawn]
    left_out = sum(not math.isfinite(value) for entry in series for _, value in entry.points)
    return Chart(f"{title}, logarithmic" if y.logarithmic else title, y.ticks(), lines, left_out)


def _path(points: list[Point], x: Scale, y: Scale) -> str:
    """Draw a line that is interrupted where a value is not finite; a lone point becomes a dot."""
    parts = []
    for finite, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            places = [f"{x.at(step):g} {100 - y.at(value):g}" for step, value in run]
            parts.append(f"M{places[0]}h0L{' '.join(places)}")
    return "".join(parts)


def _stays(points: Sequence[Point]) -> list[list[Point]]:
    """Split a seed's alphas where steps are missing: no kernel was in place."""
    stays: list[list[Point]] = []
    for point in points:
        if not stays or point[0] > stays[-1][-1][0] + 1:
            stays.append([])
        stays[-1].append(point)
    return stays


def _outline(points: list[Point]) -> list[Point]:
    """Leave out points between which the line hardly moves; corners stay sharp."""
    kept = [points[0]]
    for before, point in pairwise(points):
        if abs(point[1] - kept[-1][1]) >= _VISIBLE_ALPHA:
            kept += [before, point]
    return list(dict.fromkeys([*kept, points[-1]]))


def _run_length(points: Sequence[Point]) -> int:
    return max(1, math.ceil(len(points) / _MAX_POINTS))


def _thinned(points: list[Point]) -> list[Point]:
    run = _run_length(points)
    return [_mean(points[i : i + run]) for i in range(0, len(points), run)]


def _mean(points: list[Point]) -> Point:
    finite = [point for point in points if math.isfinite(point[1])] or points[:1]
    return sum(p[0] for p in finite) / len(finite), sum(p[1] for p in finite) / len(finite)


def _scale_around(values: list[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high > _LOGARITHMIC_FROM * low:
        return Scale(low / 1.1, high * 1.1, logarithmic=True)
    return _linear_around(values)


def _linear_around(values: list[float]) -> Scale:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - margin, high + margin)


def _nice(value: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... (also below 1) that is no smaller than ``value``."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value)


def _even_ticks(low: float, high: float) -> list[float]:
    step = _nice((high - low) / 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decade_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = math.ceil(len(powers) / _MAX_TICKS)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = (10.0**power * factor for power in powers[::stride] for factor in factors)
    return [value for value in values if low <= value <= high]
