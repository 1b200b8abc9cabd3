"""Epochs, signals, kernels and views as Tamiyo sees them, and Tamiyo herself beside a test."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kasmina_library import MemoryLibrary

from esper.contracts import (
    EpochEvent,
    HealthSignal,
    KernelRecord,
    LifecycleEvent,
    SeedEvaluation,
    SeedId,
    SeedState,
)
from esper.oona import Oona
from esper.tamiyo import Cost, ModelView, Tamiyo
from esper.testing import FakeLibrary

FLAT, FALLING = [1.0, 1.0, 1.0, 1.0], [1.0, 0.8, 0.6, 0.4]


def epochs(
    losses: Sequence[float],
    *evaluations: SeedEvaluation,
    train_losses: Sequence[float] | None = None,
) -> tuple[EpochEvent, ...]:
    return tuple(
        EpochEvent(
            epoch=number,
            step=10 * number,
            train_loss=loss if train_losses is None else train_losses[number],
            val_loss=loss,
            val_loss_standard_error=0.1,
            evaluations=evaluations if number == len(losses) - 1 else (),
        )
        for number, loss in enumerate(losses)
    )


def signal(seed_id: SeedId, energy: float) -> HealthSignal:
    return HealthSignal(
        seed_id=seed_id,
        health_score=1.0,
        execution_time_us=1.0,
        lifecycle_state=SeedState.DORMANT,
        epoch=0,
        step=0,
        mean=0.0,
        variance=1.0,
        dead_fraction=0.0,
        non_finite=0,
        gradient_energy=energy,
        error_count=0,
    )


def evaluation(contribution: float, error: float = 0.1) -> SeedEvaluation:
    return SeedEvaluation(
        seed_id=("fc", 0),
        loss_with=1.0,
        loss_without=1.0 + contribution,
        contribution=contribution,
        standard_error=error,
        num_samples=100,
    )


def kernel_costing(
    parameters: int = 1,
    flops: int = 1,
    memory_bytes: int | None = 1,
    risk_score: float | None = 0.1,
    tags: tuple[str, ...] = (),
) -> KernelRecord:
    library = MemoryLibrary()
    record = library.bundles[library.add()].record
    manifest = record.manifest.model_copy(
        update={"num_parameters": parameters, "flops_per_sample": flops}
    )
    return KernelRecord(
        artifact_id=manifest.artifact_id,
        manifest=manifest,
        status=record.status,
        memory_bytes=memory_bytes,
        risk_score=risk_score,
        tags=tags,
    )


def moved(
    source: SeedState, target: SeedState, epoch: int = 5, seed_id: SeedId = ("fc", 1)
) -> LifecycleEvent:
    return LifecycleEvent(
        seed_id=seed_id, source=source, target=target, epoch=epoch, step=1, reason="test"
    )


def view(kernel: KernelRecord, losses: Sequence[float] = FLAT, **changes: object) -> ModelView:
    defaults: dict[str, object] = {
        "epochs": epochs(losses),
        "health": {("fc", 0): signal(("fc", 0), 1.0), ("fc", 1): signal(("fc", 1), 3.0)},
        "states": {},
        "failures": {},
        "last_failure_epoch": {},
        "adapting": frozenset(),
        "loss_before": {},
        "num_adaptations": 0,
        "spent": Cost(),
        "last_change_epoch": None,
        "candidates": lambda _: [kernel],
    }
    return ModelView(**defaults | changes)  # type: ignore[arg-type]


@contextmanager
def controller(bus: Oona) -> Iterator[None]:
    """Have a controller listen in a thread with a loop of its own; closes the bus in the end."""

    async def run() -> None:
        await Tamiyo(bus, FakeLibrary([]), lambda _: None).run()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield
    finally:
        bus.close()
        thread.join()
