"""What was grown, where, when and why, what it cost and what it brought: one entry an attempt."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from esper.contracts import (
    FieldReport,
    LifecycleEvent,
    Outcome,
    SeedEvaluation,
    SeedId,
    SeedState,
)
from esper.nissa.charts import Scale
from esper.nissa.formats import state_label
from esper.nissa.record import RunRecord
from esper.nissa.story import GROWING, designs, started_epoch

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
    seed_id: SeedId
    design: str
    outcome: str
    started_epoch: int
    ended_epoch: int | None  # None: it has not ended
    num_parameters: int
    why: str  # the controller's reason to begin; empty if the record has none
    verdict: str
    state: SeedState  # in whose colour the outcome is drawn
    evaluation: SeedEvaluation | None
    bar: EffectBar | None = None


def adaptations(record: RunRecord) -> list[Adaptation]:
    """Return all attempts: those that have ended, in the order of time, and then the others."""
    attempts = [_ended(record, report) for report in record.field_reports]
    attempts += [_unfinished(record, begin, last) for begin, last in _without_end(record)]
    scale = _effect_scale(attempt.evaluation for attempt in attempts)
    return [replace(attempt, bar=_bar(attempt.evaluation, scale)) for attempt in attempts]


def _ended(record: RunRecord, report: FieldReport) -> Adaptation:
    return Adaptation(
        seed_id=report.seed_id,
        design=designs(record).get(report.artifact_id, report.artifact_id[:12]),
        outcome=_outcome(report.outcome),
        started_epoch=started_epoch(record, report),
        ended_epoch=report.ended_epoch,
        num_parameters=report.num_parameters,
        why=_why(record, report),
        verdict=report.reason,
        state=_STATES[report.outcome],
        evaluation=report.evaluation,
    )


def _unfinished(record: RunRecord, begin: LifecycleEvent, last: LifecycleEvent) -> Adaptation:
    is_over = record.finished or record.interrupted
    artifact_id = begin.artifact_id or ""
    return Adaptation(
        seed_id=begin.seed_id,
        design=designs(record).get(artifact_id, artifact_id[:12]),
        outcome="unfinished" if is_over else "under way",
        started_epoch=begin.epoch,
        ended_epoch=None,
        num_parameters=_parameters(record, artifact_id),
        why=begin.reason,
        verdict=f"none, {'the run ended' if is_over else 'it is'} in {state_label(last.target)}",
        state=last.target,
        evaluation=_latest_evaluation(record, begin),
    )


def _outcome(outcome: Outcome) -> str:
    return "kept" if outcome is Outcome.FOSSILIZED else outcome.lower().replace("_", " ")


def _without_end(record: RunRecord) -> list[tuple[LifecycleEvent, LifecycleEvent]]:
    """Return for each attempt without an end the event that began it, and the latest one."""
    begun: dict[SeedId, tuple[LifecycleEvent, LifecycleEvent]] = {}
    for event in record.lifecycle:
        if event.target is SeedState.GERMINATED:
            begun[event.seed_id] = event, event
        elif event.target not in GROWING:
            begun.pop(event.seed_id, None)
        elif event.seed_id in begun:
            begun[event.seed_id] = begun[event.seed_id][0], event
    return list(begun.values())


def _latest_evaluation(record: RunRecord, begin: LifecycleEvent) -> SeedEvaluation | None:
    evaluations = [
        evaluation
        for event in record.epochs
        for evaluation in event.evaluations
        if event.epoch >= begin.epoch and evaluation.seed_id == begin.seed_id
    ]
    return evaluations[-1] if evaluations else None


def _parameters(record: RunRecord, artifact_id: str) -> int:
    manifests = [entry.kernel.manifest for entry in record.kernels]
    return next((m.num_parameters for m in manifests if m.artifact_id == artifact_id), 0)


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
