"""Tamiyo keeps what the bus tells about one model and has a policy decide at every epoch's end."""

import asyncio
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    Contract,
    EpochEvent,
    HealthBatch,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    LifecycleEvent,
    OonaMessage,
    RequestKind,
    SeedId,
    TamiyoRequest,
    TamiyoStatus,
    Topic,
)
from esper.oona import Oona
from esper.tamiyo.budget import why_not
from esper.tamiyo.explosion import rollbacks
from esper.tamiyo.history import History, HistoryRecord
from esper.tamiyo.journal import Journal, Library, QueryFor
from esper.tamiyo.offers import Offer, best_offers
from esper.tamiyo.plateau import PlateauPolicy
from esper.tamiyo.policy import Policy

logger = logging.getLogger(__name__)

_HEARD = (Topic.SEED_HEALTH, Topic.LIFECYCLE, Topic.EPOCH, Topic.TAMIYO_REQUESTS)


class TamiyoRecord(Contract):
    """What ``state_dict()`` holds."""

    format_version: int = 1
    paused: bool
    history: HistoryRecord


class Tamiyo:
    """Strategic controller of one model. Runs on one event loop.

    ``policy`` decides; whatever it decides, the budgets of ``settings`` are kept, commands lapse
    after ``command_lifetime_epochs``, and a loss that explodes is rolled back. With ``journal``
    everything that decisions depend on is written to that file; see :mod:`esper.tamiyo.replay`.
    """

    def __init__(
        self,
        bus: Oona,
        library: Library,
        query_for: Callable[[SeedId], KernelQuery | None],
        policy: Policy | None = None,
        *,
        settings: TamiyoSettings | None = None,
        journal: Path | None = None,
    ):
        if policy is not None and not callable(getattr(policy, "decide", None)):
            raise TypeError(
                "policy must have a method decide(view), as esper.tamiyo.PlateauPolicy has, "
                f"got {policy!r}"
            )
        self._bus = bus
        self._unrecorded = library, query_for
        self._journal = None if journal is None else Journal(journal, library, query_for)
        self._library: Library = self._journal or library
        self._query_for: QueryFor = query_for if self._journal is None else self._journal.query_for
        self._settings = settings or TamiyoSettings()
        self._policy = policy or PlateauPolicy(self._settings)
        # Joined here and not in run(): nothing that is published from now on may be overlooked.
        self._streams = {topic: bus.subscribe(topic, "tamiyo") for topic in _HEARD}
        self._history = History()
        self._paused = False
        self._turn = asyncio.Lock()  # one message at a time: decisions follow from their order

    async def run(self) -> None:
        """Serve until the bus is closed."""
        async with asyncio.TaskGroup() as tasks:
            for topic in _HEARD:
                tasks.create_task(self._follow(topic))

    async def _follow(self, topic: Topic) -> None:
        async for message in self._streams[topic]:
            await self.handle(message)

    async def handle(self, message: OonaMessage) -> None:
        """Take one message in, and act upon it."""
        async with self._turn:
            if self._journal is not None:
                self._journal.note(message)
            match message.payload:
                case HealthBatch() as batch:
                    self._history.note_health(batch)
                case LifecycleEvent() as event:
                    await self._note_transition(event)
                case EpochEvent() as event:
                    await self._end_of_epoch(event)
                case TamiyoRequest() as request:
                    self._answer(request)

    # ------------------------------------------------------------------ from outside

    def pause(self) -> None:
        """Begin nothing new; what is under way is brought to its end. Any thread."""
        self._paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`. Any thread."""
        self._paused = False

    def status(self, request_id: str | None = None) -> TamiyoStatus:
        """Tell what is under way, and what it costs. Between two messages."""
        history = self._history
        spent = history.spent
        return TamiyoStatus(
            request_id=request_id,
            paused=self._paused,
            policy=type(self._policy).__name__,
            epoch=history.epochs[-1].epoch if history.epochs else None,
            adapting=tuple((seed, history.states[seed]) for seed in sorted(history.adapting)),
            num_adaptations=history.num_adaptations,
            num_parameters=spent.parameters,
            flops_per_sample=spent.flops_per_sample,
            memory_bytes=spent.memory_bytes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that Tamiyo remembers, in JSON types. Between two messages."""
        record = TamiyoRecord(paused=self._paused, history=self._history.record())
        state: dict[str, Any] = json.loads(record.model_dump_json())  # which writes NaN as a string
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned. Before :meth:`run`.

        Raises ``ValueError``, and nothing is changed, for anything else.
        """
        record = TamiyoRecord.model_validate(state)
        self._history = History.restored(record.history)
        self._paused = record.paused

    def _answer(self, request: TamiyoRequest) -> None:
        if request.kind is RequestKind.PAUSE:
            self.pause()
        elif request.kind is RequestKind.RESUME:
            self.resume()
        status = self.status(request.request_id)
        self._bus.publish(Topic.TAMIYO_STATUS, "tamiyo", status)

    async def prospects(self) -> list[Offer]:
        """Return what may germinate next, by the default policy's measure, the likeliest first.

        Each free seed with the kernel that the library ranks first there. Decides nothing, and the
        journal does not hear of it.
        """
        async with self._turn:
            view = self._history.view(self._candidates(*self._unrecorded))
        return await asyncio.to_thread(best_offers, view, self._settings)

    # ------------------------------------------------------------------ decisions

    async def _end_of_epoch(self, event: EpochEvent) -> None:
        self._history.note_epoch(event)
        commands = rollbacks(self._history, self._settings.explosion_factor)
        if not commands:
            view = self._history.view(self._candidates(self._library, self._query_for))
            commands = await asyncio.to_thread(self._policy.decide, view)
        for command in commands:
            await self._issue(command)

    async def _issue(self, command: KasminaControlCommand) -> None:
        seed_id = (command.layer_name, command.seed_idx)
        if command.kind is CommandKind.GERMINATE:
            if not await self._begin(command):
                return
        elif seed_id in self._history.adaptations:
            self._history.note_verdict(command)
            adaptation = self._history.adaptations[seed_id]
            changes: dict[str, object] = {"artifact_id": adaptation.kernel.artifact_id}
            if command.kind is CommandKind.ROLL_BACK and adaptation.refused is command.kind:
                changes["kind"] = CommandKind.CULL  # there is nothing to go back to
            command = command.model_copy(update=changes)
        if command.valid_until_epoch is None:
            last = command.epoch + self._settings.command_lifetime_epochs
            command = command.model_copy(update={"valid_until_epoch": last})
        logger.info("%s seed %d on '%s': %s", command.kind, seed_id[1], seed_id[0], command.reason)
        self._bus.publish(Topic.KASMINA_COMMANDS, "tamiyo", command)

    async def _begin(self, command: KasminaControlCommand) -> bool:
        """Take a germination into the books, if the policy may have it."""
        assert command.artifact_id is not None
        seed_id = (command.layer_name, command.seed_idx)
        kernel = await asyncio.to_thread(self._library.kernel, command.artifact_id)
        obstacle = why_not(kernel, self._history.spent, self._settings)
        if self._paused:
            obstacle = "Tamiyo is paused"
        if seed_id in self._history.adaptations:
            obstacle = "the seed is taken"
        if obstacle is not None:
            logger.warning(
                "no germination of seed %d on '%s': %s", seed_id[1], seed_id[0], obstacle
            )
            return False
        self._history.note_germination(command, kernel)
        return True

    async def _note_transition(self, event: LifecycleEvent) -> None:
        report = self._history.note_transition(event)
        if report is not None:
            await asyncio.to_thread(self._library.record_field_report, report)
            self._bus.publish(Topic.FIELD_REPORTS, "tamiyo", report)

    def _candidates(
        self, library: Library, query_for: QueryFor
    ) -> Callable[[SeedId], Sequence[KernelRecord]]:
        """Return a function that asks the library once for each distinct site."""
        ask = functools.cache(library.query)

        def candidates(seed_id: SeedId) -> Sequence[KernelRecord]:
            query = query_for(seed_id)
            return [] if query is None else ask(self._within_means(query))

        return candidates

    def _within_means(self, query: KernelQuery) -> KernelQuery:
        """Leave out what cannot be afforded, so that the limit of a query does not hide the rest."""
        settings, spent = self._settings, self._history.spent
        changes: dict[str, object] = {
            "required_tags": query.required_tags | settings.required_tags,
            "excluded_tags": query.excluded_tags | settings.excluded_tags,
        }
        if settings.max_parameters is not None:
            changes["max_parameters"] = max(0, settings.max_parameters - spent.parameters)
        return query.model_copy(update=changes)
