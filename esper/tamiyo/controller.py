"""Tamiyo keeps what the bus tells about one model and has a policy decide at every epoch's end."""

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.contracts import (
    CommandKind,
    EpochEvent,
    FieldReport,
    HealthSignal,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    LifecycleEvent,
    Outcome,
    SeedEvaluation,
    SeedId,
    SeedState,
    Topic,
)
from esper.kasmina.lifecycle import OCCUPIED
from esper.oona import Oona
from esper.tamiyo.policy import ModelView, PlateauPolicy, Policy

logger = logging.getLogger(__name__)

_ENDS = (SeedState.FOSSILIZED, SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK)


class Library(Protocol):
    """What Tamiyo asks of Urza."""

    def query(self, query: KernelQuery) -> list[KernelRecord]: ...
    def kernel(self, artifact_id: str) -> KernelRecord: ...
    def record_field_report(self, report: FieldReport) -> None: ...


class _Adaptation:
    """One kernel at one seed, from its germination to its end."""

    def __init__(self, kernel: KernelRecord, started_epoch: int):
        self.kernel = kernel
        self.started_epoch = started_epoch
        self.evaluation: SeedEvaluation | None = None
        self.verdict: str | None = None
        self.occupied = False


class Tamiyo:
    """Strategic controller of one model. Runs on the pipeline's event loop."""

    def __init__(
        self,
        bus: Oona,
        library: Library,
        query_for: Callable[[SeedId], KernelQuery | None],
        policy: Policy | None = None,
    ):
        self._bus = bus
        self._library = library
        self._query_for = query_for
        self._policy = policy or PlateauPolicy()
        # Joined here and not in run(): nothing that is published from now on may be overlooked.
        self._streams = {
            topic: bus.subscribe(topic, "tamiyo")
            for topic in (Topic.SEED_HEALTH, Topic.LIFECYCLE, Topic.EPOCH)
        }
        self._epochs: list[EpochEvent] = []
        self._health: dict[SeedId, HealthSignal] = {}
        self._states: dict[SeedId, SeedState] = {}
        self._adaptations: dict[SeedId, _Adaptation] = {}
        self._failures: dict[SeedId, set[str]] = {}
        self._num_adaptations = 0
        self._last_change_epoch: int | None = None

    async def run(self) -> None:
        """Serve until the bus is closed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_health())
            tasks.create_task(self._follow_lifecycle())
            tasks.create_task(self._follow_epochs())

    async def _follow_health(self) -> None:
        async for message in self._streams[Topic.SEED_HEALTH]:
            for signal in message.payload.signals:  # type: ignore[attr-defined]
                self._health[signal.seed_id] = signal

    async def _follow_lifecycle(self) -> None:
        async for message in self._streams[Topic.LIFECYCLE]:
            assert isinstance(message.payload, LifecycleEvent)
            await self._note_transition(message.payload)

    async def _follow_epochs(self) -> None:
        async for message in self._streams[Topic.EPOCH]:
            assert isinstance(message.payload, EpochEvent)
            await self._end_of_epoch(message.payload)

    async def _end_of_epoch(self, event: EpochEvent) -> None:
        self._epochs.append(event)
        for evaluation in event.evaluations:
            if evaluation.seed_id in self._adaptations:
                self._adaptations[evaluation.seed_id].evaluation = evaluation
        commands = await asyncio.to_thread(self._policy.decide, self._view())
        for command in commands:
            await self._issue(command)

    async def _issue(self, command: KasminaControlCommand) -> None:
        seed_id = (command.layer_name, command.seed_idx)
        if command.kind is CommandKind.GERMINATE:
            assert command.artifact_id is not None
            kernel = await asyncio.to_thread(self._library.kernel, command.artifact_id)
            self._adaptations[seed_id] = _Adaptation(kernel, command.epoch)
            self._states[seed_id] = SeedState.GERMINATED  # on its way; no second one meanwhile
            self._num_adaptations += 1
        elif seed_id in self._adaptations:
            self._adaptations[seed_id].verdict = command.reason
        logger.info("%s seed %d on '%s': %s", command.kind, seed_id[1], seed_id[0], command.reason)
        self._bus.publish(Topic.KASMINA_COMMANDS, "tamiyo", command)

    async def _note_transition(self, event: LifecycleEvent) -> None:
        self._states[event.seed_id] = event.target
        adaptation = self._adaptations.get(event.seed_id)
        if adaptation is None:
            return
        if event.source is event.target:
            if event.target not in OCCUPIED:
                del self._adaptations[event.seed_id]  # the germination was refused
            return
        if event.target in (SeedState.TRAINING, SeedState.GRAFTING):
            adaptation.occupied = True
        if event.target in _ENDS:
            await self._conclude(event, adaptation)

    async def _conclude(self, event: LifecycleEvent, adaptation: _Adaptation) -> None:
        self._last_change_epoch = event.epoch
        if event.target is not SeedState.FOSSILIZED:
            del self._adaptations[event.seed_id]
            failed = self._failures.setdefault(event.seed_id, set())
            failed.add(adaptation.kernel.artifact_id)
        report = FieldReport(
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
        await asyncio.to_thread(self._library.record_field_report, report)
        self._bus.publish(Topic.FIELD_REPORTS, "tamiyo", report)

    def _view(self) -> ModelView:
        return ModelView(
            epochs=tuple(self._epochs),
            health=dict(self._health),
            states=dict(self._states),
            failures={seed_id: frozenset(ids) for seed_id, ids in self._failures.items()},
            adapting=frozenset(
                seed_id
                for seed_id in self._adaptations
                if self._states.get(seed_id) is not SeedState.FOSSILIZED
            ),
            num_adaptations=self._num_adaptations,
            num_parameters_added=sum(
                adaptation.kernel.manifest.num_parameters
                for adaptation in self._adaptations.values()
            ),
            last_change_epoch=self._last_change_epoch,
            candidates=self._candidates(),
        )

    def _candidates(self) -> Callable[[SeedId], Sequence[KernelRecord]]:
        """Return a function that asks the library once for each distinct site."""
        ask = functools.cache(self._library.query)

        def candidates(seed_id: SeedId) -> Sequence[KernelRecord]:
            query = self._query_for(seed_id)
            return [] if query is None else ask(query)

        return candidates


def _outcome(event: LifecycleEvent, adaptation: _Adaptation) -> Outcome:
    if event.target is SeedState.CULLED and not adaptation.occupied:
        return Outcome.FAILED
    return Outcome(event.target.name)
