"""What was grown, where, when and why, what it cost and what it brought: one entry an attempt."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from esper.contracts import FieldReport, Outcome, SeedEvaluation, SeedState
from esper.nissa.charts import Scale
from esper.nissa.record import RunRecord
from esper.nissa.story import designs, started_epoch

_STATES = {
    Outcome.FOSSILIZED: SeedState.FOSSILIZED,
    Outcome.CULLED: SeedState.CULLED,
    Outcome.CANCELLED: SeedState.CANCELLED,
    Outcome.ROLLED_BACK: SeedState.ROLLED_BACK,
    Outcome.FAILED: SeedState.CULLED,
}


@dataclass(frozen=True)
class EffectBar:
    """A kernel's contribution, drawn from zero, with two standard errors to each side.

    All places are in percent of the width, on one scale for all kernels of a run.
    """

    zero: float
    left: float
    width: float
    error_left: float
    error_width: float
    helps: bool


@dataclass(frozen=True)
class Adaptation:
    report: FieldReport
    design: str
    started_epoch: int
    why: str  # the controller's reason to begin; empty if the record has none
    state: SeedState  # in whose colour the outcome is drawn
    bar: EffectBar | None


def adaptations(record: RunRecord) -> list[Adaptation]:
    """Return all attempts that have ended, in the order of time."""
    names = designs(record)
    scale = _effect_scale(report.evaluation for report in record.field_reports)
    return [
        Adaptation(
            report,
            names.get(report.artifact_id, report.artifact_id[:12]),
            started_epoch(record, report),
            _why(record, report),
            _STATES[report.outcome],
            _bar(report.evaluation, scale),
        )
        for report in record.field_reports
    ]


def _why(record: RunRecord, report: FieldReport) -> str:
    begin = started_epoch(record, report)
    return next(
        (
            event.reason
            for event in record.lifecycle
            if event.target is SeedState.GERMINATED
            and (event.seed_id, event.epoch) == (report.seed_id, begin)
        ),
        "",
    )


def _effect_scale(evaluations: Iterable[SeedEvaluation | None]) -> Scale:
    ends = [end for e in evaluations if e is not None and _drawable(e) for end in _interval(e)]
    low, high = min((0.0, *ends)), max((0.0, *ends))
    return Scale(low, high if high > low else low + 1.0)


def _bar(evaluation: SeedEvaluation | None, scale: Scale) -> EffectBar | None:
    if evaluation is None or not _drawable(evaluation):
        return None
    zero, end = scale.at(0), scale.at(evaluation.contribution)
    low, high = (scale.at(value) for value in _interval(evaluation))
    return EffectBar(
        zero=zero,
        left=min(zero, end),
        width=round(abs(end - zero), 2),
        error_left=low,
        error_width=round(high - low, 2),
        helps=evaluation.contribution > 0,
    )


def _interval(evaluation: SeedEvaluation) -> tuple[float, float]:
    error = 2 * evaluation.standard_error
    return evaluation.contribution - error, evaluation.contribution + error


def _drawable(evaluation: SeedEvaluation) -> bool:
    return math.isfinite(evaluation.contribution) and math.isfinite(evaluation.standard_error)
