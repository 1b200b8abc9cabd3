"""The few numbers that a reader of the report looks for first."""

import math
from typing import NamedTuple

from esper.contracts import KernelStatus, Outcome
from esper.nissa.formats import count, duration, loss, percent, plural
from esper.nissa.record import LayerSummary, RunRecord


class Figure(NamedTuple):
    label: str
    value: str
    note: str


def figures(record: RunRecord) -> list[Figure]:
    """Return what can be told so far; an empty record has the time alone."""
    found = (_grown(record), _loss(record), _accuracy(record), _kernels(record), _time(record))
    return [figure for figure in found if figure is not None]


def parameters(layers: tuple[LayerSummary, ...]) -> int:
    """Return the number of parameters of layers, with the kernels that are blended in."""
    return sum(
        layer.host_parameters + sum(seed.parameters for seed in layer.seeds) for layer in layers
    )


def _grown(record: RunRecord) -> Figure | None:
    if not record.field_reports:
        return None
    kept = [report for report in record.field_reports if report.outcome is Outcome.FOSSILIZED]
    added = sum(report.num_parameters for report in kept)
    tried = plural(len(record.field_reports), "attempt")
    note = f"parameters: {len(kept)} of {tried} kept"
    if record.before:
        note += f", onto {count(parameters(record.before))}"
    return Figure("grown", f"+{count(added)}", note)


def _loss(record: RunRecord) -> Figure | None:
    finite = [event for event in record.epochs if math.isfinite(event.val_loss)]
    if not finite:
        return None
    best = min(finite, key=lambda event: event.val_loss)
    note = f"{loss(finite[0].val_loss)} at first, best {loss(best.val_loss)} at epoch {best.epoch}"
    return Figure("held-out loss", loss(record.epochs[-1].val_loss), note)


def _accuracy(record: RunRecord) -> Figure | None:
    accuracies = [e.val_accuracy for e in record.epochs if e.val_accuracy is not None]
    if not accuracies:
        return None
    return Figure(
        "held-out accuracy", percent(accuracies[-1]), f"{percent(accuracies[0])} at first"
    )


def _kernels(record: RunRecord) -> Figure | None:
    if not record.kernels:
        return None
    statuses = [entry.kernel.status for entry in record.kernels]
    note = (
        f"{statuses.count(KernelStatus.VALIDATED)} validated, "
        f"{statuses.count(KernelStatus.REJECTED)} rejected"
    )
    return Figure("kernels made", count(len(statuses)), note)


def _time(record: RunRecord) -> Figure:
    return Figure("trained", duration(record.duration_s), plural(len(record.epochs), "epoch"))
