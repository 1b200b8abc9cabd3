"""What happened in a run, in plain words, for someone who has never heard of Esper.

Names of layers and designs stand between backticks.
"""

import math
from collections.abc import Callable, Container, Iterable

from esper.contracts import (
    EpochEvent,
    FieldReport,
    KernelStatus,
    Outcome,
    SeedState,
)
from esper.nissa.formats import loss, plural
from esper.nissa.record import ResultRow, RunRecord

_WINDOW = 4  # epochs before an adaptation in which the loss is compared with what went before
_STALLED = 0.02  # a smaller relative improvement within the window counts as none
GROWING = [s for s in SeedState if SeedState.GERMINATED <= s < SeedState.FOSSILIZED]

Scored = tuple[ResultRow, float]  # the higher the better


def headline(record: RunRecord) -> str:
    """One sentence: what became of the network."""
    kept = [report for report in record.field_reports if report.outcome is Outcome.FOSSILIZED]
    tried = kept or record.field_reports
    if tried:
        return _opening(record, tried[0]) + (_kept(record, kept) if kept else _removed(record))
    if layers := _layers(record, [SeedState.FOSSILIZED]):
        return f"The network {record.network} has grown in {layers}."
    if layers := _layers(record, GROWING):
        return f"The network {record.network} is growing in {layers}; the verdict is still open."
    if not record.epochs:
        return f"The network {record.network} has not finished its first epoch yet."
    epochs = plural(len(record.epochs), "epoch")
    if not record.finished:
        return f"Nothing has grown so far: the network {record.network} has trained for {epochs}."
    return f"Nothing was grown: the network {record.network} trained for {epochs} as it was."


def details(record: RunRecord) -> list[str]:
    """What was made for the run, and whether any of it could prove itself."""
    return [text for text in (_forge(record), unjudged(record)) if text]


def unjudged(record: RunRecord) -> str:
    """Say so if training ended before any kernel could prove itself; empty otherwise."""
    judged = record.field_reports or any(event.evaluations for event in record.epochs)
    if judged or not (record.finished or record.interrupted):
        return ""
    validated = plural(_statuses(record).count(KernelStatus.VALIDATED), "kernel")
    return (
        f"No kernel was judged in the network: "
        f"the pipeline had validated {validated} when training ended."
    )


def started_epoch(record: RunRecord, report: FieldReport) -> int:
    """Return the epoch in which the seed germinated; the decision may have fallen one earlier."""
    germinations = [
        event.epoch
        for event in record.lifecycle
        if event.target is SeedState.GERMINATED
        and (event.seed_id, event.artifact_id) == (report.seed_id, report.artifact_id)
        and report.started_epoch <= event.epoch <= report.ended_epoch
    ]
    return germinations[0] if germinations else report.started_epoch


def verdict(results: Iterable[ResultRow]) -> str:
    """Compare the grown network with the best other one, on accuracy or else on loss."""
    rows = list(results)
    accuracies = [(row, row.test_accuracy) for row in rows if row.test_accuracy is not None]
    losses = [(row, -row.test_loss) for row in rows if row.test_loss is not None]
    if len(accuracies) == len(rows):
        return _compared(accuracies, lambda lead: f"{100 * lead:.2f} percentage points")
    if len(losses) == len(rows):
        return _compared(losses, lambda lead: f"{loss(lead)} in loss")
    return ""


def designs(record: RunRecord) -> dict[str, str]:
    """Map artifact ids to the names of their designs."""
    return {
        entry.kernel.artifact_id: entry.kernel.manifest.design.name for entry in record.kernels
    } | {
        seed.artifact_id: seed.design
        for layer in record.after
        for seed in layer.seeds
        if seed.artifact_id and seed.design
    }


def _opening(record: RunRecord, report: FieldReport) -> str:
    epoch = started_epoch(record, report)
    if _had_stalled(record.epochs, report.started_epoch):
        return f"The network {record.network} could no longer improve at epoch {epoch}; "
    return f"In the network {record.network}, at epoch {epoch}, "


def _had_stalled(epochs: Iterable[EpochEvent], until_epoch: int) -> bool:
    losses = [event.val_loss for event in epochs if event.epoch <= until_epoch]
    earlier, window = (
        [value for value in part if math.isfinite(value)]
        for part in (losses[:-_WINDOW], losses[-_WINDOW:])
    )
    if not earlier or not window:
        return False
    return min(window) > (1 - _STALLED) * min(earlier)


def _kernel(record: RunRecord, report: FieldReport) -> str:
    design = designs(record).get(report.artifact_id, report.artifact_id[:12])
    return f"a `{design}` kernel of {plural(report.num_parameters, 'parameter')}"


def _kept(record: RunRecord, kept: list[FieldReport]) -> str:
    first, *more = kept
    text = f"{_kernel(record, first)} was grown into `{first.seed_id[0]}` and kept"
    return f"{text}, and {plural(len(more), 'more kernel')} after it." if more else f"{text}."


def _removed(record: RunRecord) -> str:
    first, *more = record.field_reports
    if more:
        return f"{1 + len(more)} kernels were tried and all removed again."
    return f"{_kernel(record, first)} was tried in `{first.seed_id[0]}` and removed again."


def _layers(record: RunRecord, states: Container[SeedState]) -> str:
    """Name the layers with a seed that was last seen in one of ``states``."""
    latest = {event.seed_id: event.target for event in record.lifecycle}
    names = {layer: None for (layer, _), state in latest.items() if state in states}
    return ", ".join(f"`{name}`" for name in names)


def _forge(record: RunRecord) -> str:
    statuses = _statuses(record)
    if not statuses:
        return ""
    return (
        f"Tried out in a sandbox while training went on: {plural(len(statuses), 'kernel')}, "
        f"{statuses.count(KernelStatus.VALIDATED)} of them found safe and correct, "
        f"{statuses.count(KernelStatus.REJECTED)} rejected."
    )


def _statuses(record: RunRecord) -> list[KernelStatus]:
    return [entry.kernel.status for entry in record.kernels]


def _compared(scored: list[Scored], described: Callable[[float], str]) -> str:
    grown = [pair for pair in scored if pair[0].grown]
    others = [pair for pair in scored if not pair[0].grown and math.isfinite(pair[1])]
    if not grown or not others:
        return ""
    ours, our_score = grown[0]
    best, best_score = max(others, key=lambda pair: pair[1])
    if not math.isfinite(our_score):
        return f"`{ours.label}` diverged; `{best.label}` ({_size(best)}) is the better network."
    if our_score == best_score:
        return (
            f"On the test set, `{ours.label}` ({_size(ours)}) and `{best.label}` ({_size(best)}) "
            f"are equally good."
        )
    if our_score > best_score:
        return _won(ours, best, described(our_score - best_score)) + "."
    return _won(best, ours, described(best_score - our_score)) + ": growing did not win here."


def _won(winner: ResultRow, loser: ResultRow, lead: str) -> str:
    return (
        f"On the test set, `{winner.label}` ({_size(winner)}) beats `{loser.label}` "
        f"({_size(loser)}) by {lead}"
    )


def _size(row: ResultRow) -> str:
    return plural(row.parameters, "parameter")
