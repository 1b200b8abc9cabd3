"""What one run did: a frozen contract to keep, and the collector that a training loop feeds."""

import json
import threading
import time
from collections.abc import Iterable, Mapping

from pydantic import Field

from esper.contracts import (
    Contract,
    EpochEvent,
    FieldReport,
    KernelRecord,
    LifecycleEvent,
    SeedId,
    SeedState,
    Sha256,
    UrabraskValidationReport,
)


class StepLoss(Contract):
    step: int
    epoch: int
    loss: float


class AlphaSeries(Contract):
    """How far one seed was blended into its layer's output, as ``(step, alpha)`` in step order.

    There is a point for every step with a kernel in place, and one for the step that removed it.
    """

    seed_id: SeedId
    points: tuple[tuple[int, float], ...]


class SeedSummary(Contract):
    """One seed at one moment; the fields after ``state`` are empty unless it holds a kernel."""

    index: int = Field(ge=0)
    state: SeedState = SeedState.DORMANT
    design: str | None = None
    artifact_id: Sha256 | None = None
    parameters: int = Field(default=0, ge=0)  # added by the kernel; 0 before it is blended in
    contribution: float | None = None  # held-out loss without the seed minus with it


class LayerSummary(Contract):
    """One host layer and its seeds at one moment; ``None`` in the shape is any size."""

    fqn: str
    type: str
    output_shape: tuple[int | None, ...]
    channels: int = Field(ge=1)
    host_parameters: int = Field(ge=0)
    seeds: tuple[SeedSummary, ...] = ()


class KernelConsidered(Contract):
    """An artifact that the forge made, and the evaluator's report once there is one."""

    kernel: KernelRecord
    report: UrabraskValidationReport | None = None


class ResultRow(Contract):
    """One line of the final table. ``grown`` marks the network that this run trained."""

    label: str
    parameters: int = Field(ge=0)
    test_accuracy: float | None = None  # in [0, 1]
    test_loss: float | None = None
    training_flops: float | None = None  # over the whole run
    note: str = ""
    grown: bool = False


class RunRecord(Contract):
    """Everything about one run that is worth keeping; all that the report shows comes from it."""

    name: str
    network: str  # as a reader would call it: "64-10-10-10"
    command: str  # reproduces the run
    seed: int
    machine: str
    torch_version: str
    started_at: float  # seconds since the Unix epoch
    duration_s: float = Field(ge=0)  # of training this network; so far, if it still goes on
    finished: bool
    interrupted: bool = False
    step_losses: tuple[StepLoss, ...] = ()
    epochs: tuple[EpochEvent, ...] = ()
    lifecycle: tuple[LifecycleEvent, ...] = ()
    alphas: tuple[AlphaSeries, ...] = ()
    before: tuple[LayerSummary, ...] = ()
    after: tuple[LayerSummary, ...] = ()
    kernels: tuple[KernelConsidered, ...] = ()
    field_reports: tuple[FieldReport, ...] = ()
    results: tuple[ResultRow, ...] = ()
    audit_head: str | None = None  # digest of the last link of the library's audit chain

    def to_json(self) -> str:
        """Serialise for :meth:`from_json`; a diverged loss stays ``NaN`` or ``Infinity``."""
        # Pydantic's own JSON turns the non-finite numbers of nested contracts into null.
        return json.dumps(self.model_dump())

    @classmethod
    def from_json(cls, data: str | bytes) -> "RunRecord":
        return cls.model_validate_json(data)


class RunRecorder:
    """Collects a run as it happens; any method may be called from any thread.

    Takes plain numbers only, so it never makes the caller's thread wait for the device. The lock is
    held for one append, or for the copy that :meth:`record` makes.
    """

    def __init__(
        self,
        name: str,
        *,
        network: str,
        command: str,
        seed: int,
        machine: str,
        torch_version: str,
        before: Iterable[LayerSummary] = (),
    ) -> None:
        self._run: dict[str, object] = {
            "name": name,
            "network": network,
            "command": command,
            "seed": seed,
            "machine": machine,
            "torch_version": torch_version,
            "started_at": time.time(),
            "before": tuple(before),
        }
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._step_losses: list[StepLoss] = []
        self._epochs: list[EpochEvent] = []
        self._lifecycle: list[LifecycleEvent] = []
        self._alphas: dict[SeedId, list[tuple[int, float]]] = {}
        self._kernels: dict[str, KernelConsidered] = {}
        self._field_reports: list[FieldReport] = []
        self._outcome: dict[str, object] = {"finished": False}

    def add_step(self, step: int, epoch: int, loss: float) -> None:
        entry = StepLoss(step=step, epoch=epoch, loss=loss)
        with self._lock:
            self._step_losses.append(entry)

    def add_alphas(self, step: int, alphas: Mapping[SeedId, float]) -> None:
        with self._lock:
            for seed_id, alpha in alphas.items():
                self._alphas.setdefault(seed_id, []).append((step, alpha))

    def add_epoch(self, event: EpochEvent) -> None:
        with self._lock:
            self._epochs.append(event)

    def add_lifecycle(self, event: LifecycleEvent) -> None:
        with self._lock:
            self._lifecycle.append(event)

    def add_kernel(
        self, kernel: KernelRecord, report: UrabraskValidationReport | None = None
    ) -> None:
        """Record an artifact; a later call for the same artifact replaces the earlier one."""
        entry = KernelConsidered(kernel=kernel, report=report)
        with self._lock:
            self._kernels[kernel.artifact_id] = entry

    def add_field_report(self, report: FieldReport) -> None:
        with self._lock:
            self._field_reports.append(report)

    def stop_clock(self) -> None:
        """Training is over; what is measured afterwards does not count. The first call stands."""
        with self._lock:
            self._outcome.setdefault("duration_s", time.perf_counter() - self._started)

    def finish(
        self,
        *,
        after: Iterable[LayerSummary] = (),
        results: Iterable[ResultRow] = (),
        audit_head: str | None = None,
        interrupted: bool = False,
    ) -> None:
        """Close the run: what became of the network. Stops the clock if it still runs."""
        self.stop_clock()
        outcome = {
            "finished": not interrupted,
            "interrupted": interrupted,
            "after": tuple(after),
            "results": tuple(results),
            "audit_head": audit_head,
        }
        with self._lock:
            self._outcome |= outcome

    def record(self) -> RunRecord:
        """Return everything so far; the run may go on."""
        with self._lock:
            alphas = {seed_id: tuple(points) for seed_id, points in self._alphas.items()}
            collected = {
                "step_losses": tuple(self._step_losses),
                "epochs": tuple(self._epochs),
                "lifecycle": tuple(self._lifecycle),
                "kernels": tuple(self._kernels.values()),
                "field_reports": tuple(self._field_reports),
                "duration_s": time.perf_counter() - self._started,
                **self._outcome,
            }
        series = tuple(AlphaSeries(seed_id=id_, points=points) for id_, points in alphas.items())
        return RunRecord.model_validate({**self._run, **collected, "alphas": series})
