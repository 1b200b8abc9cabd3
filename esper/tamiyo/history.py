"""What Tamiyo remembers of one model: what was observed, what is under way, and what failed."""

from collections.abc import Callable, Sequence

from esper.contracts import (
    CommandKind,
    Contract,
    EpochEvent,
    FieldReport,
    HealthBatch,
    HealthSignal,
    KasminaControlCommand,
    KernelRecord,
    LifecycleEvent,
    Outcome,
    SeedEvaluation,
    SeedId,
    SeedState,
)
from esper.kasmina.lifecycle import OCCUPIED
from esper.tamiyo.budget import Cost, cost_of
from esper.tamiyo.policy import ModelView

_TAKEN = OCCUPIED | {SeedState.GERMINATED, SeedState.LOADING}
_ENDS = (SeedState.FOSSILIZED, SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK)


class Adaptation(Contract):
    """One kernel at one seed, from its germination to its end."""

    kernel: KernelRecord
    started_epoch: int
    heard_since_epoch: int | None = None  # by the host: GRAFTING began in it
    evaluation: SeedEvaluation | None = None
    verdict: str | None = None
    last_order: CommandKind | None = None
    refused: CommandKind | None = None  # the last order that was
    occupied: bool = False


class HistoryRecord(Contract):
    """A history in JSON types."""

    epochs: tuple[EpochEvent, ...]
    health: tuple[HealthSignal, ...]
    states: tuple[tuple[SeedId, SeedState], ...]
    adaptations: tuple[tuple[SeedId, Adaptation], ...]
    failures: tuple[tuple[SeedId, tuple[str, ...]], ...]
    last_failure_epoch: tuple[tuple[SeedId, int], ...]
    num_adaptations: int
    last_change_epoch: int | None


class History:
    """Belongs to one thread at a time; has no effects on anything else."""

    def __init__(self) -> None:
        self.epochs: list[EpochEvent] = []
        self.health: dict[SeedId, HealthSignal] = {}
        self.states: dict[SeedId, SeedState] = {}
        self.adaptations: dict[SeedId, Adaptation] = {}
        self.failures: dict[SeedId, frozenset[str]] = {}
        self.last_failure_epoch: dict[SeedId, int] = {}
        self.num_adaptations = 0
        self.last_change_epoch: int | None = None

    @property
    def spent(self) -> Cost:
        """Cost of all kernels that are in place or on their way."""
        return sum((cost_of(a.kernel) for a in self.adaptations.values()), Cost())

    @property
    def adapting(self) -> frozenset[SeedId]:
        return frozenset(
            seed_id
            for seed_id in self.adaptations
            if self.states.get(seed_id) is not SeedState.FOSSILIZED
        )

    def event_before(self, seed_id: SeedId) -> EpochEvent | None:
        """Return the last end of an epoch before the host heard a seed of an adaptation."""
        since = self.adaptations[seed_id].heard_since_epoch
        if since is None:
            return None
        return next((event for event in reversed(self.epochs) if event.epoch < since), None)

    # ------------------------------------------------------------------ what happens

    def note_health(self, batch: HealthBatch) -> None:
        self.health.update((signal.seed_id, signal) for signal in batch.signals)

    def note_epoch(self, event: EpochEvent) -> None:
        self.epochs.append(event)
        for evaluation in event.evaluations:
            self._amend(evaluation.seed_id, evaluation=evaluation)

    def note_germination(self, command: KasminaControlCommand, kernel: KernelRecord) -> None:
        """A command is on its way; its seed is taken from now on."""
        seed_id = (command.layer_name, command.seed_idx)
        self.adaptations[seed_id] = Adaptation(kernel=kernel, started_epoch=command.epoch)
        self.states[seed_id] = SeedState.GERMINATED
        self.num_adaptations += 1

    def note_verdict(self, command: KasminaControlCommand) -> None:
        seed_id = (command.layer_name, command.seed_idx)
        self._amend(seed_id, verdict=command.reason, last_order=command.kind)

    def note_transition(self, event: LifecycleEvent) -> FieldReport | None:
        """Follow a seed, and return the report on its adaptation if that has ended."""
        self.states[event.seed_id] = event.target
        adaptation = self.adaptations.get(event.seed_id)
        if adaptation is None:
            return None
        if event.source is event.target:  # a command was refused
            if event.target not in _TAKEN:
                del self.adaptations[event.seed_id]
            else:
                self._amend(event.seed_id, refused=adaptation.last_order)
            return None
        if event.target in OCCUPIED:
            self._amend(event.seed_id, occupied=True)
        if event.target is SeedState.GRAFTING:
            self._amend(event.seed_id, heard_since_epoch=event.epoch)
        return self._conclude(event, adaptation) if event.target in _ENDS else None

    def _amend(self, seed_id: SeedId, **changes: object) -> None:
        if seed_id in self.adaptations:
            self.adaptations[seed_id] = self.adaptations[seed_id].model_copy(update=changes)

    def _conclude(self, event: LifecycleEvent, adaptation: Adaptation) -> FieldReport:
        self.last_change_epoch = event.epoch
        if event.target is not SeedState.FOSSILIZED:
            del self.adaptations[event.seed_id]
            failed = self.failures.get(event.seed_id, frozenset())
            self.failures[event.seed_id] = failed | {adaptation.kernel.artifact_id}
            self.last_failure_epoch[event.seed_id] = event.epoch
        return FieldReport(
            seed_id=event.seed_id,
            artifact_id=adaptation.kernel.artifact_id,
            blueprint_id=adaptation.kernel.manifest.blueprint_id,
            outcome=_outcome(event, adaptation),
            reason=adaptation.verdict or event.reason,
            started_epoch=adaptation.started_epoch,
            ended_epoch=event.epoch,
            num_parameters=adaptation.kernel.manifest.num_parameters,
            evaluation=adaptation.evaluation,
        )

    # ------------------------------------------------------------------ what is seen of it

    def view(self, candidates: Callable[[SeedId], Sequence[KernelRecord]]) -> ModelView:
        return ModelView(
            epochs=tuple(self.epochs),
            health=dict(self.health),
            states=dict.fromkeys(self.health, SeedState.DORMANT) | self.states,
            failures=dict(self.failures),
            last_failure_epoch=dict(self.last_failure_epoch),
            adapting=self.adapting,
            loss_before={
                seed_id: event.val_loss
                for seed_id in self.adapting
                if (event := self.event_before(seed_id)) is not None
            },
            num_adaptations=self.num_adaptations,
            spent=self.spent,
            last_change_epoch=self.last_change_epoch,
            candidates=candidates,
        )

    def record(self) -> HistoryRecord:
        return HistoryRecord(
            epochs=tuple(self.epochs),
            health=tuple(self.health.values()),
            states=tuple(self.states.items()),
            adaptations=tuple(self.adaptations.items()),
            failures=tuple((seed_id, tuple(sorted(ids))) for seed_id, ids in self.failures.items()),
            last_failure_epoch=tuple(self.last_failure_epoch.items()),
            num_adaptations=self.num_adaptations,
            last_change_epoch=self.last_change_epoch,
        )

    @classmethod
    def restored(cls, record: HistoryRecord) -> "History":
        history = cls()
        history.epochs = list(record.epochs)
        history.health = {signal.seed_id: signal for signal in record.health}
        history.states = dict(record.states)
        history.adaptations = dict(record.adaptations)
        history.failures = {seed_id: frozenset(ids) for seed_id, ids in record.failures}
        history.last_failure_epoch = dict(record.last_failure_epoch)
        history.num_adaptations = record.num_adaptations
        history.last_change_epoch = record.last_change_epoch
        return history


def _outcome(event: LifecycleEvent, adaptation: Adaptation) -> Outcome:
    if event.target is SeedState.CULLED and not adaptation.occupied:
        return Outcome.FAILED
    return Outcome(event.target.name)
