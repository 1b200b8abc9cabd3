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


class Alphas(Contract):
    """The alphas of all seeds with a kernel in place, and of those that just lost theirs."""

    step: int
    alphas: tuple[tuple[SeedId, float], ...]


class RunHeader(Contract):
    """What is known of a run as it begins; the fields are those of :class:`RunRecord`."""

    name: str
    network: str
    command: str
    seed: int
    machine: str
    torch_version: str
    started_at: float
    before: tuple[LayerSummary, ...] = ()


Entry = StepLoss | EpochEvent | LifecycleEvent | Alphas | KernelConsidered | FieldReport


def assemble(header: RunHeader, entries: Iterable[Entry], **outcome: object) -> RunRecord:
    """Put a record together from what happened, in the order of time.

    ``outcome`` gives the remaining fields of the record, at least ``duration_s`` and ``finished``.
    """
    by_type: dict[type[Entry], list[Entry]] = {}
    for entry in entries:
        by_type.setdefault(type(entry), []).append(entry)
    return RunRecord.model_validate(
        {
            **dict(header),
            "step_losses": by_type.get(StepLoss, ()),
            "epochs": by_type.get(EpochEvent, ()),
            "lifecycle": by_type.get(LifecycleEvent, ()),
            "alphas": _alpha_series(by_type.get(Alphas, ())),
            "kernels": _latest_by_artifact(by_type.get(KernelConsidered, ())),
            "field_reports": by_type.get(FieldReport, ()),
            **outcome,
        }
    )


class RunRecorder:
    """Collects a run as it happens; any method may be called from any thread.

    Takes plain numbers only, so it never makes the caller's thread wait for the device. The lock is
    held for one append, or for the copy of a list.
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
        self.header = RunHeader(
            name=name,
            network=network,
            command=command,
            seed=seed,
            machine=machine,
            torch_version=torch_version,
            started_at=time.time(),
            before=tuple(before),
        )
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._outcome: dict[str, object] = {"finished": False}

    def add_step(self, step: int, epoch: int, loss: float) -> None:
        self._add(StepLoss(step=step, epoch=epoch, loss=loss))

    def add_alphas(self, step: int, alphas: Mapping[SeedId, float]) -> None:
        if alphas:
            self._add(Alphas(step=step, alphas=tuple(alphas.items())))

    def add_epoch(self, event: EpochEvent) -> None:
        self._add(event)

    def add_lifecycle(self, event: LifecycleEvent) -> None:
        self._add(event)

    def add_kernel(
        self, kernel: KernelRecord, report: UrabraskValidationReport | None = None
    ) -> None:
        """Record an artifact; a later call for the same artifact replaces the earlier one."""
        self._add(KernelConsidered(kernel=kernel, report=report))

    def add_field_report(self, report: FieldReport) -> None:
        self._add(report)

    def _add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.append(entry)

    def stop_clock(self) -> None:
        """Training is over; what is measured afterwards does not count. The first call stands."""
        with self._lock:
            self._outcome.setdefault("duration_s", self._elapsed_s())

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

    def news(self, known: int = 0) -> tuple[list[Entry], float]:
        """Return the entries after the first ``known`` ones, and the seconds of training so far."""
        with self._lock:
            elapsed_s = self._outcome.get("duration_s", self._elapsed_s())
            assert isinstance(elapsed_s, float)
            return self._entries[known:], elapsed_s

    def record(self) -> RunRecord:
        """Return everything so far; the run may go on."""
        entries, duration_s = self.news()
        with self._lock:
            outcome = {"duration_s": duration_s, **self._outcome}
        return assemble(self.header, entries, **outcome)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started


def _alpha_series(entries: Iterable[Entry]) -> list[AlphaSeries]:
    series: dict[SeedId, list[tuple[int, float]]] = {}
    for entry in entries:
        assert isinstance(entry, Alphas)
        for seed_id, alpha in entry.alphas:
            series.setdefault(seed_id, []).append((entry.step, alpha))
    return [AlphaSeries(seed_id=seed_id, points=tuple(p)) for seed_id, p in series.items()]


def _latest_by_artifact(entries: Iterable[Entry]) -> list[KernelConsidered]:
    kernels: dict[str, KernelConsidered] = {}
    for entry in entries:
        assert isinstance(entry, KernelConsidered)
        kernels[entry.kernel.artifact_id] = entry
    return list(kernels.values())
