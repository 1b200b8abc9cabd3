"""What checkpoints say of the seeds beside tensors: read off a model, and put back on another."""

import functools
from typing import TYPE_CHECKING

from esper.contracts import KasminaControlCommand, SeedId
from esper.kasmina.kernel import Kernel
from esper.kasmina.resume import KasminaRecord, TenancyRecord
from esper.kasmina.tenancy import Tenancy

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina


def capture(kasmina: "Kasmina") -> KasminaRecord:
    """Return all that a checkpoint says of the seeds beside tensors. Training thread."""
    return KasminaRecord(
        settings=kasmina.settings,
        layers=tuple(layer.capture() for layer in kasmina.layers.values()),
        tenancies=tuple(_captured(tenancy) for tenancy in kasmina.tenancies.values()),
        epoch=kasmina.epoch,
        step_count=kasmina.step_count,
        next_due=kasmina.next_due,
        observing=kasmina.observing,
        observed_step=kasmina.observed_steps.last,
        snapshot_pending=kasmina.bank.snapshot_pending,
        refresh_pending=kasmina.bank.refresh_pending,
        obeyed=kasmina.commands.obeyed(),
        commands=tuple(_waiting_commands(kasmina)),
    )


def restore(kasmina: "Kasmina", record: KasminaRecord, kernels: dict[SeedId, Kernel]) -> None:
    """Go on from ``record``, on a fresh model whose bank is already what it was.

    Kernels are seated without events and outside of any optimizer; loads that were under way
    start again at the next step. Training thread.
    """
    for saved in record.layers:
        seats = {idx: kernel for (name, idx), kernel in kernels.items() if name == saved.name}
        kasmina.layers[saved.name].restore(saved, seats)
    for tenancy in record.tenancies:
        kasmina.tenancies[tenancy.seed_id] = _restored(kasmina, tenancy)
    kasmina.epoch, kasmina.step_count = record.epoch, record.step_count
    kasmina.next_due, kasmina.observed_steps.last = record.next_due, record.observed_step
    kasmina.count_fossils()
    kasmina.commands.remember(record.obeyed)
    for command in record.commands:
        kasmina.submit(command)
    if record.snapshot_pending:
        kasmina.bank.begin_snapshot()
    if record.refresh_pending:
        kasmina.bank.begin_refresh()
    if record.observing:
        kasmina.observed_steps.watch()


def _captured(tenancy: Tenancy) -> TenancyRecord:
    return TenancyRecord(
        seed_id=(tenancy.layer.name, tenancy.seed_idx),
        artifact_id=tenancy.artifact_id,
        strategy=tenancy.strategy,
        alpha=tenancy.alpha,
        steps_left=tenancy.steps_left,
    )


def _restored(kasmina: "Kasmina", record: TenancyRecord) -> Tenancy:
    name, seed_idx = record.seed_id
    return Tenancy(
        kasmina.layers[name],
        seed_idx,
        record.artifact_id,
        record.strategy,
        record.alpha,
        record.steps_left,
    )


def _waiting_commands(kasmina: "Kasmina") -> list[KasminaControlCommand]:
    """Commands in the inbox; whoever waits there for a load by hand goes with the process."""
    waiting = [
        entry.args[0]
        for entry in kasmina.inbox.copy()
        if isinstance(entry, functools.partial) and entry.func == kasmina.commands.obey
    ]
    return waiting if kasmina.peers is None else waiting + kasmina.peers.submitted()
