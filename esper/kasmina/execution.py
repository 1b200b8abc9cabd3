"""Kasmina of one model: all its layers and seeds, and what happens between two steps.

The training thread alone moves seeds. Other threads hand over finished things (a prepared kernel,
a command), which :meth:`Kasmina.advance` applies between two steps. In the other direction
lifecycle events and observations go to callbacks that must only append.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import logging
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import esper.kasmina.morph as morph
from esper.config import SeedSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    LifecycleEvent,
    SeedId,
    SeedState,
)
from esper.errors import DistributedError, EsperError
from esper.kasmina.bank import SeedBank
from esper.kasmina.cache import KernelCache
from esper.kasmina.enrollment import Enrollment
from esper.kasmina.handles import LayerHandles
from esper.kasmina.host_state import HostState, num_bytes
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import ACTIVE, check_edge
from esper.kasmina.loader import KernelLoader, KernelSource, compute_alone
from esper.kasmina.observation import Observation
from esper.kasmina.resume import KasminaRecord, TenancyRecord
from esper.kasmina.seat import Seat
from esper.kasmina.site import SiteType
from esper.kasmina.tenancy import Tenancy
from esper.kasmina.uncompiled import Uncompiled

if TYPE_CHECKING:
    from esper.kasmina.peers import Peers

logger = logging.getLogger(__name__)

_REMEMBERED_COMMANDS = 4096  # ids kept so that a command delivered twice is obeyed once
_NEVER = 2**62
_LOADER_THREADS = 2  # while one waits for the library, the other builds
_REFRESH_EVERY = 8  # steps between two looks at what the device did to occupied seeds

# Modules that carry some model's seeds: a second wrap must not plant on them again.
SEEDED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Kasmina:
    """Execution layer of one wrapped model. It compiles nothing and decides nothing."""

    def __init__(
        self,
        sites: dict[str, tuple[nn.Module, SiteType]],
        settings: SeedSettings,
        device: torch.device,
        aliases: Mapping[str, str],
    ) -> None:
        self.settings = settings
        self.bank = SeedBank(len(sites) * settings.seeds_per_layer, device)
        self.cache = KernelCache(settings.cache_capacity_bytes)
        handles = {
            name: KasminaLayer(self, name, module, kind, number * settings.seeds_per_layer)
            for number, (name, (module, kind)) in enumerate(sites.items())
        }
        self.layers = LayerHandles(handles, aliases)
        self.epoch = 0
        self.step_count = 0
        self.next_due = settings.observe_every if settings.telemetry_enabled else _NEVER
        self.observing = False
        self.inbox: deque[Callable[[], None]] = deque()
        self.tenancies: dict[SeedId, Tenancy] = {}
        self.num_occupied = 0
        self.num_transitions = 0
        self.advance_ns = 0  # that advance() has taken of the training thread
        self.to_be_shown = any(layer.shapes is None for layer in self.layers.values())
        self.compiled_blocks: list[Any] = []  # of esper.kasmina.compilation
        self.emit_lifecycle: Callable[[LifecycleEvent], None] | None = None
        self.emit_observation: Callable[[Observation], None] | None = None
        self.enrollment = Enrollment(self.layers)
        self.peers: Peers | None = None  # of a distributed run
        self.deterministic = settings.deterministic
        self._uncompiled = Uncompiled()
        self._fossils: set[SeedId] = set()
        self._observed_step = 0
        self._obeyed: OrderedDict[str, None] = OrderedDict()
        self._loader: KernelLoader | None = None
        self._executor: ThreadPoolExecutor | None = None
        self.training_thread = threading.get_ident()

    def plant(self, root: nn.Module) -> None:
        """Begin, on a new model or on a copy.

        Layers whose width is unknown are observed for one forward; the others are not touched.
        """
        self._root = weakref.ref(root)
        for layer in self.layers.values():
            SEEDED.add(layer.default_transform)
            if layer.shapes is None:
                layer.arm()

    # ------------------------------------------------------------------ what others hand in

    def connect(self, library: KernelSource) -> None:
        """Let kernels be loaded from ``library``."""
        self._loader = KernelLoader(library, self.cache)

    @property
    def library(self) -> KernelSource | None:
        """The library that kernels are loaded from, or None."""
        return None if self._loader is None else self._loader.source

    def layer(self, name: str) -> KasminaLayer:
        """Return a layer's handle; raises ``ValueError`` for an unknown name."""
        if name not in self.layers:
            known = ", ".join([*self.layers][:8]) + (", ..." if len(self.layers) > 8 else "")
            raise ValueError(f"Layer {name} not found (layers with seeds: {known})")
        return self.layers[name]

    def submit(self, command: KasminaControlCommand) -> None:
        """Have a command obeyed at the next step boundary, once per ``command_id``. Any thread.

        In a distributed run all ranks obey it; there rank 0 alone may submit, and the others raise
        :class:`DistributedError`.
        """
        if self.peers is None:
            self.inbox.append(functools.partial(self.obey, command))
        else:
            self.peers.submit(command)

    @property
    def follows(self) -> bool:
        """Whether another rank decides over the seeds."""
        return self.peers is not None and not self.peers.leads

    def on_training_thread(self) -> bool:
        return threading.get_ident() == self.training_thread

    def request(
        self,
        layer: KasminaLayer,
        seed_idx: int,
        artifact_id: str,
        strategy: GraftingStrategy,
        reason: str,
    ) -> None:
        """DORMANT > GERMINATED; loading begins at the next step boundary. Training thread."""
        self._admit(Tenancy(layer, seed_idx, artifact_id, strategy), reason)

    async def load_by_hand(
        self, layer: KasminaLayer, seed_idx: int, artifact_id: str, alpha: float
    ) -> bool:
        """See :meth:`KasminaLayer.load_kernel`. Any thread."""
        tenancy = Tenancy(layer, seed_idx, artifact_id, alpha=alpha)
        if self.peers is not None:
            return self._load_on_all_ranks(tenancy, self.peers)
        if not self.on_training_thread():
            self.inbox.append(functools.partial(self._admit_remotely, tenancy))
            return await asyncio.wrap_future(tenancy.settled)
        self._admit(tenancy)
        prepared = asyncio.wrap_future(self.prepare(tenancy))
        await asyncio.gather(prepared, return_exceptions=True)  # settle() sees to its errors
        if not tenancy.settled.done():  # a step may have come first, while this was waiting
            self.settle(tenancy)
        return tenancy.settled.result()

    def _load_on_all_ranks(self, tenancy: Tenancy, peers: "Peers") -> bool:
        if not self.on_training_thread():
            raise DistributedError(
                f"{tenancy.layer.seed_name(tenancy.seed_idx)}: in a distributed run load_kernel is "
                "awaited on the training thread of every rank"
            )
        self._admit(tenancy)
        peers.load_now(tenancy)
        return tenancy.settled.result()

    def prepare(self, tenancy: Tenancy) -> "Future[Kernel]":
        """GERMINATED > LOADING: have the kernel prepared in the background. Training thread."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                _LOADER_THREADS, thread_name_prefix="esper-loader", initializer=compute_alone
            )
        if tenancy.layer.state(tenancy.seed_idx) is SeedState.GERMINATED:
            tenancy.layer.await_kernel(tenancy.seed_idx)
        tenancy.prepared = self._executor.submit(
            self.load, tenancy.layer, tenancy.seed_idx, tenancy.artifact_id
        )
        return tenancy.prepared

    def settle(self, tenancy: Tenancy) -> None:
        """LOADING > TRAINING, GRAFTING or CULLED, by what came of the preparation."""
        if tenancy.layer.state(tenancy.seed_idx) is SeedState.LOADING:  # not culled meanwhile
            self.conclude(tenancy, self.obstacle(tenancy))

    def obstacle(self, tenancy: Tenancy) -> BaseException | None:
        """Return why the kernel whose preparation has ended cannot take its seat, if so."""
        prepared = tenancy.prepared
        assert prepared is not None
        if prepared.cancelled() or tenancy.settled.done():
            return EsperError("the load was given up")
        return prepared.exception() or self._misfit(tenancy, prepared.result())

    def conclude(self, tenancy: Tenancy, error: BaseException | None) -> None:
        """LOADING > TRAINING or GRAFTING with the prepared kernel, or > CULLED for an error."""
        prepared, tenancy.prepared, tenancy.fits = tenancy.prepared, None, False
        assert prepared is not None
        if error is None:
            self._seat(tenancy, prepared.result())
        else:
            tenancy.layer.reject_kernel(tenancy.seed_idx, error)
        tenancy.answer(error is None)

    # ------------------------------------------------------------------ between two steps

    def advance(self) -> None:
        """Apply what is due. Called by ``model.step()`` when anything may be."""
        began_ns = time.perf_counter_ns()
        self._end_observation()
        if self.peers is not None:
            self.peers.meet()
        with self.bank.writes_together():
            for tenancy in list(self.tenancies.values()):
                self._count_down(tenancy)
            while self.inbox:
                self.inbox.popleft()()
            self._pursue_loads()
        if self.num_occupied:
            self._tick()
        self._hand_out_snapshot()
        self._begin_observation()
        self.advance_ns += time.perf_counter_ns() - began_ns

    def _tick(self) -> None:
        """Advance the seeds on the device, and see what it did to them some steps ago."""
        if self.peers is not None:
            self.peers.share_device_state()
        self.bank.tick(self.settings.max_errors)
        self.bank.finish_refresh()
        if self.step_count % _REFRESH_EVERY == 0:
            self.bank.begin_refresh()
        if self.peers is None:  # else rank 0 has all ranks do so
            for seed_id, reason in list(self.quarantined()):
                self.take_out(seed_id, reason)

    def count_in(self, seat: Seat) -> None:
        self.num_occupied += 1
        self.cache.pin(seat.kernel.artifact_id)

    def seat_taken(self, layer: KasminaLayer, seat: Seat) -> None:
        self.count_in(seat)
        if self.enrollment.attachments:
            self.enrollment.enroll(layer, seat)
        elif seat.kernel.weights():
            logger.warning(
                "%s: its kernel will not learn: no optimizer is attached to the model "
                "(model.attach_optimizer)",
                seat.seed,
            )

    def seat_given_back(self, seat: Seat) -> None:
        self.num_occupied -= 1
        self.cache.unpin(seat.kernel.artifact_id)
        self.enrollment.dismiss(seat)

    def record_transition(
        self,
        layer: KasminaLayer,
        seed_idx: int,
        source: SeedState,
        target: SeedState,
        reason: str,
        artifact_id: str | None,
    ) -> None:
        """Follow a seed's move with its tenancy, and tell whoever listens."""
        self.num_transitions += 1
        seed_id = (layer.name, seed_idx)
        if self.peers is not None:
            self.peers.note(seed_id, target)
        tenancy = self.tenancies.get(seed_id)
        if tenancy is not None:
            tenancy.steps_left = self._duration(tenancy.strategy, target)
            artifact_id = artifact_id or tenancy.artifact_id
            if target in (SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK):
                tenancy.answer(False)
                tenancy.host_state = None
            elif target is SeedState.GRAFTING:
                tenancy.host_state = self._host_state(layer.seed_name(seed_idx))
        if target is SeedState.FOSSILIZED:
            self._fossils.add(seed_id)
        if target in (SeedState.DORMANT, SeedState.FOSSILIZED, SeedState.ROLLED_BACK):
            self.tenancies.pop(seed_id, None)
        logger.info("%s: %s > %s (%s)", layer.seed_name(seed_idx), source.name, target.name, reason)
        self._emit(layer, seed_idx, source, target, reason, artifact_id)

    def _host_state(self, seed_name: str) -> HostState | None:
        """Copy the host as it is before it hears a seed, unless it is too large for that."""
        root = self._root()
        assert root is not None
        optimizers = [attached.optimizer for attached in self.enrollment.attachments]
        needed, capacity = num_bytes(root, optimizers), self.settings.rollback_capacity_bytes
        if needed <= capacity:
            return HostState(root, optimizers)
        if capacity:
            logger.warning(
                "%s can be culled but not rolled back: a copy of the host takes %d bytes, and "
                "SeedSettings.rollback_capacity_bytes is %d",
                seed_name,
                needed,
                capacity,
            )
        return None

    def roll_back(self, layer: KasminaLayer, seed_idx: int, reason: str) -> None:
        """See :meth:`KasminaLayer.roll_back`. Training thread."""
        name, source = layer.seed_name(seed_idx), layer.state(seed_idx)
        check_edge(source, SeedState.ROLLED_BACK, name)
        tenancy = self.tenancies.get((layer.name, seed_idx))
        host_state = None if tenancy is None else tenancy.host_state
        if source in ACTIVE and host_state is None:
            raise EsperError(
                f"{name}: the host's state of before it heard the seed is not there: it is kept "
                "within SeedSettings.rollback_capacity_bytes, and not saved in checkpoints"
            )
        layer.lock(seed_idx, reason)
        if host_state is not None:
            host_state.restore()

    def seeds_in(self, states: frozenset[SeedState]) -> list[SeedId]:
        return [
            (layer.name, seed_idx)
            for layer in self.layers.values()
            for seed_idx, state in enumerate(layer.state_layout.lifecycle_states())
            if state in states
        ]

    def release(self) -> None:
        """Give every layer the class that it has when it is not observed."""
        self.observing = False
        self._uncompiled.end()
        morph.unwatch(self._hosts())

    def _watch(self) -> None:
        """Have every layer report its forwards; :meth:`release` ends it."""
        morph.watch(self._hosts(), [layer.observer for layer in self.layers.values()])

    def _hosts(self) -> list[nn.Module]:
        return [layer.default_transform for layer in self.layers.values()]

    def uproot(self) -> None:
        """Take leave of the model, which is unwrapped."""
        self.release()
        if self.peers is not None:
            self.peers.leave()
        for block in self.compiled_blocks:
            block.release()
        self.close()
        for layer in self.layers.values():
            SEEDED.discard(layer.default_transform)

    def close(self) -> None:
        """Stop the loading threads; kernels in place stay, loads under way are given up."""
        for tenancy in self.tenancies.values():
            tenancy.answer(False)
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kasmina":
        """Copy seeds, kernels and layers; the copy has no listeners and no optimizer."""
        twin = object.__new__(Kasmina)
        memo[id(self)] = twin
        fresh: dict[str, Any] = {
            "cache": KernelCache(self.settings.cache_capacity_bytes),
            "inbox": deque(),
            "emit_lifecycle": None,
            "emit_observation": None,
            "enrollment": None,  # below, as it needs the layers
            "observing": False,
            "compiled_blocks": [],
            "peers": None,
            "_uncompiled": Uncompiled(),
            "_loader": None,
            "_executor": None,
        }
        for name, value in self.__dict__.items():
            twin.__dict__[name] = fresh[name] if name in fresh else copy.deepcopy(value, memo)
        twin.enrollment = Enrollment(twin.layers)
        if self._loader is not None:
            twin.connect(self._loader.source)
        return twin

    # ------------------------------------------------------------------ checkpoints

    def capture(self) -> KasminaRecord:
        """Return all that a checkpoint says of the seeds beside tensors. Training thread."""
        return KasminaRecord(
            settings=self.settings,
            layers=tuple(layer.capture() for layer in self.layers.values()),
            tenancies=tuple(_captured_tenancy(tenancy) for tenancy in self.tenancies.values()),
            epoch=self.epoch,
            step_count=self.step_count,
            next_due=self.next_due,
            observing=self.observing,
            observed_step=self._observed_step,
            snapshot_pending=self.bank.snapshot_pending,
            refresh_pending=self.bank.refresh_pending,
            obeyed=tuple(self._obeyed),
            commands=tuple(self._waiting_commands()),
        )

    def restore(self, record: KasminaRecord, kernels: dict[SeedId, Kernel]) -> None:
        """Go on from ``record``, on a fresh model whose bank is already what it was.

        Kernels are seated without events and outside of any optimizer; loads that were under way
        start again at the next step. Training thread.
        """
        for saved in record.layers:
            seats = {idx: kernel for (name, idx), kernel in kernels.items() if name == saved.name}
            self.layers[saved.name].restore(saved, seats)
        for tenancy in record.tenancies:
            self._restore_tenancy(tenancy)
        self.epoch, self.step_count = record.epoch, record.step_count
        self.next_due, self._observed_step = record.next_due, record.observed_step
        self._fossils = set(self.seeds_in(frozenset({SeedState.FOSSILIZED})))
        self._obeyed = OrderedDict.fromkeys(record.obeyed)
        for command in record.commands:
            self.submit(command)
        if record.snapshot_pending:
            self.bank.begin_snapshot()
        if record.refresh_pending:
            self.bank.begin_refresh()
        self.observing = record.observing
        if self.observing:
            self._watch()

    def _restore_tenancy(self, record: TenancyRecord) -> None:
        name, seed_idx = record.seed_id
        self.tenancies[name, seed_idx] = Tenancy(
            self.layers[name],
            seed_idx,
            record.artifact_id,
            record.strategy,
            record.alpha,
            record.steps_left,
        )

    def _waiting_commands(self) -> list[KasminaControlCommand]:
        """Commands in the inbox; whoever waits there for a load by hand goes with the process."""
        waiting = [
            entry.args[0]
            for entry in self.inbox.copy()
            if isinstance(entry, functools.partial) and entry.func == self.obey
        ]
        return waiting if self.peers is None else waiting + self.peers.submitted()

    def seat_at_once(
        self, layer: KasminaLayer, seed_idx: int, kernel: Kernel, state: SeedState, alpha: float
    ) -> None:
        """Lead a DORMANT seed to ``state`` (GRAFTING or later), from where it is moved by hand."""
        tenancy = Tenancy(layer, seed_idx, kernel.artifact_id, alpha=alpha)
        self._admit(tenancy, "from a state_dict")
        layer.await_kernel(seed_idx)
        layer.graft_new(seed_idx, kernel, None, alpha)
        tenancy.answer(True)
        if state >= SeedState.STABILIZATION:
            layer.stabilize(seed_idx, alpha)
        if state >= SeedState.EVALUATING:
            layer.evaluate(seed_idx)
        if state is SeedState.FINE_TUNING:
            layer.fine_tune(seed_idx, "as in the state_dict")
        if state is SeedState.FOSSILIZED:
            layer.fossilize(seed_idx, "as in the state_dict")

    # ------------------------------------------------------------------ the stations of a tenancy

    def _duration(self, strategy: GraftingStrategy | None, state: SeedState) -> int | None:
        if state is SeedState.CULLED:
            return self.settings.embargo_steps
        if strategy is None:
            return None
        return {
            SeedState.TRAINING: strategy.training_steps,
            SeedState.GRAFTING: strategy.grafting_steps,
            SeedState.STABILIZATION: strategy.stabilization_steps,
            SeedState.FINE_TUNING: strategy.fine_tuning_steps,
        }.get(state)

    def _count_down(self, tenancy: Tenancy) -> None:
        if tenancy.steps_left is None:
            return
        tenancy.steps_left -= 1
        if tenancy.steps_left <= 0:
            _move_on(tenancy)

    def loading(self) -> list[Tenancy]:
        """Return the tenancies whose kernel is still to come, in the order of their admission."""
        states = (SeedState.GERMINATED, SeedState.LOADING)
        return [t for t in self.tenancies.values() if t.layer.state(t.seed_idx) in states]

    def _pursue_loads(self) -> None:
        if self.peers is not None:
            self.peers.settle_loads()
            return
        for tenancy in self.loading():
            self._pursue_loading(tenancy)

    def _pursue_loading(self, tenancy: Tenancy) -> None:
        prepared = tenancy.prepared or self.prepare(tenancy)
        if self.deterministic:
            concurrent.futures.wait([prepared])
        if prepared.done():
            self.settle(tenancy)

    def follow(self, move: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Go where the model goes: ``move`` is what it applies to its tensors."""
        if device.type != "meta":
            self.bank.move_to(device)
        for layer in self.layers.values():
            for seat in layer.occupants():
                seat.cells.refresh()
                if seat.isolated:  # the others are in the module tree
                    seat._apply(move)  # type: ignore[no-untyped-call]
            layer.rearrange()

    def isolated_seats(self) -> list[Seat]:
        seats = [seat for layer in self.layers.values() for seat in layer.occupants()]
        return [seat for seat in seats if seat.isolated]

    def _admit(self, tenancy: Tenancy, reason: str = "loaded by hand") -> None:
        tenancy.layer.germinate(tenancy.seed_idx, tenancy.artifact_id, reason)
        self.tenancies[tenancy.layer.name, tenancy.seed_idx] = tenancy

    def _admit_remotely(self, tenancy: Tenancy) -> None:
        try:
            self._admit(tenancy)
        except EsperError as error:
            tenancy.settled.set_exception(error)

    def load(self, layer: KasminaLayer, seed_idx: int, artifact_id: str) -> Kernel:
        """Return a fresh, verified kernel for a seed; see :meth:`KernelLoader.prepare`."""
        if self._loader is None:
            raise EsperError("no library is connected: call model.connect(library) first")
        if layer.device != self.bank.device:
            raise EsperError(
                f"layer '{layer.name}' is on {layer.device}, the seeds on {self.bank.device}: "
                "move the wrapped model as a whole"
            )
        site = layer.site(seed_idx)
        kernel = self._loader.prepare(artifact_id, site, layer.dtype, layer.device)
        # A millisecond that the training thread is spared: it asks again, and is told at once.
        with contextlib.suppress(EsperError):
            self.enrollment.check(layer, kernel)
        return kernel

    def _misfit(self, tenancy: Tenancy, kernel: Kernel) -> EsperError | None:
        """Return what layer or optimizers have against the kernel, if they do."""
        layer = tenancy.layer
        if "forward" in layer.default_transform.__dict__:
            return EsperError(
                f"layer '{layer.name}' has a forward of its own on the instance, which an active "
                "class cannot reach"
            )
        try:
            self.enrollment.check(layer, kernel)
        except EsperError as error:
            return error
        return None

    def _seat(self, tenancy: Tenancy, kernel: Kernel) -> None:
        if tenancy.strategy is not None and kernel.weights():
            tenancy.layer.train(tenancy.seed_idx, kernel)
        else:
            tenancy.layer.graft_new(tenancy.seed_idx, kernel, tenancy.strategy, tenancy.alpha)

    def quarantined(self) -> Iterator[tuple[SeedId, str]]:
        """Yield the seeds that the device has taken out of the output for good, and why."""
        for seed_id, tenancy in self.tenancies.items():
            reason = tenancy.layer.quarantine_reason(tenancy.seed_idx)
            if reason is not None:
                yield seed_id, reason
        for name, seed_idx in self._fossils:
            layer = self.layers[name]
            reason = layer.quarantine_reason(seed_idx)
            if reason is not None and not layer.is_bypassed(seed_idx):
                yield (name, seed_idx), reason

    def take_out(self, seed_id: SeedId, reason: str) -> None:
        """Cull a quarantined seed, or stop running it if it is FOSSILIZED."""
        layer, seed_idx = self.layers[seed_id[0]], seed_id[1]
        if layer.state(seed_idx) is not SeedState.FOSSILIZED:
            layer.cull(seed_idx, f"quarantined: {reason}")
        elif not layer.is_bypassed(seed_idx):
            layer.bypass(seed_idx)
            self._report_lost_fossil(layer, seed_idx, reason)

    def _report_lost_fossil(self, layer: KasminaLayer, seed_idx: int, reason: str) -> None:
        """FOSSILIZED is final, so all that can be done is to say that a part is missing."""
        reason = f"bypassed: {reason}"
        logger.error("%s: %s", layer.seed_name(seed_idx), reason)
        fossilized = SeedState.FOSSILIZED
        self._emit(layer, seed_idx, fossilized, fossilized, reason, None)

    def _emit(
        self,
        layer: KasminaLayer,
        seed_idx: int,
        source: SeedState,
        target: SeedState,
        reason: str,
        artifact_id: str | None,
    ) -> None:
        """Tell whoever listens. What listeners do wrong must not decide over a transition."""
        if self.emit_lifecycle is None:
            return
        event = LifecycleEvent(
            seed_id=(layer.name, seed_idx),
            source=source,
            target=target,
            epoch=self.epoch,
            step=self.step_count,
            artifact_id=artifact_id,
            reason=reason,
        )
        try:
            self.emit_lifecycle(event)
        except Exception:
            logger.exception("a lifecycle event was not delivered: %s", event)

    # ------------------------------------------------------------------ commands

    def obey(self, command: KasminaControlCommand) -> None:
        """Carry a command out, unless that was done already, or refuse it."""
        if command.command_id in self._obeyed:
            return
        self._obeyed[command.command_id] = None
        if len(self._obeyed) > _REMEMBERED_COMMANDS:
            self._obeyed.popitem(last=False)
        try:
            self._carry_out(command)
        except (EsperError, ValueError) as error:
            self._refuse(command, error)

    def _refuse(self, command: KasminaControlCommand, error: Exception) -> None:
        """Say so in the log, and to whoever sent it by an event that leads from a state to itself."""
        logger.warning("command %s %s refused: %s", command.kind, command.command_id, error)
        layer = self.layers.get(command.layer_name)
        if layer is not None and command.seed_idx < layer.num_seeds:
            state = layer.state(command.seed_idx)
            reason = f"{command.kind} refused: {error}"
            self._emit(layer, command.seed_idx, state, state, reason, command.artifact_id)

    def _carry_out(self, command: KasminaControlCommand) -> None:
        layer = self.layer(command.layer_name)
        layer.check_seed(command.seed_idx)
        self._check_current(command, layer)
        if command.kind is CommandKind.GERMINATE:
            assert command.artifact_id is not None
            layer.request_germination(
                command.seed_idx, command.artifact_id, command.strategy, reason=command.reason
            )
        elif command.kind is CommandKind.KEEP:
            layer.keep(command.seed_idx, command.reason)
        elif command.kind is CommandKind.CULL:
            layer.cull(command.seed_idx, command.reason)
        else:
            layer.roll_back(command.seed_idx, command.reason)

    def _check_current(self, command: KasminaControlCommand, layer: KasminaLayer) -> None:
        """Raise :class:`EsperError` for a command that what has happened since has overtaken."""
        last = command.valid_until_epoch
        if last is not None and self.epoch > last:
            raise EsperError(
                f"stale: decided on epoch {command.epoch} and valid until epoch {last}, but it is "
                f"epoch {self.epoch}"
            )
        if command.kind is CommandKind.GERMINATE or command.artifact_id is None:
            return
        tenancy = self.tenancies.get((layer.name, command.seed_idx))
        present = None if tenancy is None else tenancy.artifact_id
        if present != command.artifact_id:
            raise EsperError(
                f"stale: meant for kernel {command.artifact_id}, but {present} is at "
                f"{layer.seed_name(command.seed_idx)}"
            )

    # ------------------------------------------------------------------ observed steps

    def _begin_observation(self) -> None:
        if self.step_count < self.next_due or not self.settings.telemetry_enabled:
            return
        self.observing = True
        self.bank.reset_health()
        self._observed_step = self.step_count
        self.next_due = self.step_count + 1  # the step that ends the observation
        self._watch()
        if "torch._dynamo" in sys.modules:  # somebody may compile
            self._uncompiled.begin()

    def _end_observation(self) -> None:
        if not self.observing:
            return
        self.release()
        if self.emit_observation is None:
            self.next_due = self._observed_step + self.settings.observe_every
        else:
            self.bank.begin_snapshot()

    def _hand_out_snapshot(self) -> None:
        """Pass a completed snapshot on; while one is on its way, look again at the next step."""
        if self.step_count < self.next_due or not self.bank.snapshot_pending:
            return
        snapshot = self.bank.take_snapshot()
        if snapshot is None:
            self.next_due = self.step_count + 1
            return
        self.next_due = self._observed_step + self.settings.observe_every
        if self.emit_observation is not None:
            watched = tuple((layer, layer.observer.timer) for layer in self.layers.values())
            observation = Observation(
                snapshot, watched, self.epoch, self._observed_step, self.step_count
            )
            try:
                self.emit_observation(observation)
            except Exception:
                logger.exception("the observation of step %d was not delivered", observation.step)


def _captured_tenancy(tenancy: Tenancy) -> TenancyRecord:
    return TenancyRecord(
        seed_id=(tenancy.layer.name, tenancy.seed_idx),
        artifact_id=tenancy.artifact_id,
        strategy=tenancy.strategy,
        alpha=tenancy.alpha,
        steps_left=tenancy.steps_left,
    )


def _move_on(tenancy: Tenancy) -> None:
    """Take the edge that is due when a state's steps are over."""
    layer, seed_idx = tenancy.layer, tenancy.seed_idx
    state = layer.state(seed_idx)
    if state is SeedState.TRAINING:
        assert tenancy.strategy is not None
        layer.graft(seed_idx, tenancy.strategy)
    elif state is SeedState.GRAFTING:
        layer.stabilize(seed_idx)
    elif state is SeedState.STABILIZATION:
        layer.evaluate(seed_idx)
    elif state is SeedState.FINE_TUNING:
        layer.fossilize(seed_idx, "fine-tuned")
    elif state is SeedState.CULLED:
        layer.revive(seed_idx)
