"""Kasmina of one model: all its layers and seeds, and what happens between two steps.

The training thread alone moves seeds. Other threads hand over finished things (a prepared kernel,
a command), which :meth:`Kasmina.advance` applies between two steps. In the other direction
lifecycle events and observations go to callbacks that must only append.
"""

import asyncio
import copy
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.config import SeedSettings
from esper.contracts import (
    GraftingStrategy,
    KasminaControlCommand,
    LifecycleEvent,
    SeedId,
    SeedState,
)
from esper.errors import DistributedError, EsperError
from esper.kasmina.bank import SeedBank
from esper.kasmina.cache import KernelCache
from esper.kasmina.commands import Commands
from esper.kasmina.dynamo_limit import warn_before_limit
from esper.kasmina.enrollment import Enrollment
from esper.kasmina.handles import LayerHandles
from esper.kasmina.host_state import HostState, num_bytes
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import ACTIVE, check_edge
from esper.kasmina.loader import KernelSource
from esper.kasmina.loads import Loads
from esper.kasmina.observation import Observation
from esper.kasmina.observed_steps import NEVER, ObservedSteps
from esper.kasmina.seat import Seat
from esper.kasmina.selection import near
from esper.kasmina.site import SiteType
from esper.kasmina.stations import count_down, duration
from esper.kasmina.tenancy import Tenancy

if TYPE_CHECKING:
    from esper.kasmina.peers import Peers

logger = logging.getLogger(__name__)

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
        self.next_due = settings.observe_every if settings.telemetry_enabled else NEVER
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
        self.commands = Commands(self)
        self.loads = Loads(self)
        self.observed_steps = ObservedSteps(self)
        self._fossils: set[SeedId] = set()
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
        self.loads.connect(library)

    @property
    def library(self) -> KernelSource | None:
        """The library that kernels are loaded from, or None."""
        return self.loads.library

    def layer(self, name: str) -> KasminaLayer:
        """Return a layer's handle; raises ``ValueError`` for an unknown name."""
        if name not in self.layers:
            known = ", ".join(map(repr, [*self.layers][:8])) + ", ..." * (len(self.layers) > 8)
            hint = near(name, self.layers) or f" (layers with seeds: {known})"
            raise ValueError(f"Layer {name} not found{hint}")
        return self.layers[name]

    def submit(self, command: KasminaControlCommand) -> None:
        """Have a command obeyed at the next step boundary, once per ``command_id``. Any thread.

        In a distributed run all ranks obey it; there rank 0 alone may submit, and the others raise
        :class:`DistributedError`.
        """
        if self.peers is None:
            self.inbox.append(functools.partial(self.commands.obey, command))
        else:
            self.peers.submit(command)

    def foresee(self, seed_id: SeedId, artifact_id: str) -> None:
        """Have blocks that are compiled in the background prepare for what may germinate.

        Any thread, but one at a time.
        """
        try:
            for block in self.compiled_blocks:
                block.foresee(self.layer(seed_id[0]), seed_id[1], artifact_id)
        except EsperError as error:
            logger.warning("kernel %s is not compiled ahead: %s", artifact_id[:12], error)

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
        self.loads.check_connected()
        if not self.on_training_thread():
            self.inbox.append(functools.partial(self._admit_remotely, tenancy))
            return await asyncio.wrap_future(tenancy.settled)
        self._admit(tenancy)
        prepared = asyncio.wrap_future(self.loads.prepare(tenancy))
        await asyncio.gather(prepared, return_exceptions=True)  # settle() sees to its errors
        if not tenancy.settled.done():  # a step may have come first, while this was waiting
            self.loads.settle(tenancy)
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

    # ------------------------------------------------------------------ between two steps

    def advance(self) -> None:
        """Apply what is due. Called by ``model.step()`` when anything may be."""
        began_ns = time.perf_counter_ns()
        self.observed_steps.end()
        if self.peers is not None:
            self.peers.meet()
        with self.bank.writes_together():
            for tenancy in list(self.tenancies.values()):
                count_down(tenancy)
            while self.inbox:
                self.inbox.popleft()()
            if self.peers is None:
                self.loads.pursue()
            else:
                self.peers.settle_loads()
        if self.num_occupied:
            self._tick()
        self.observed_steps.hand_out_snapshot()
        self.observed_steps.begin()
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
            tenancy.steps_left = duration(self.settings, tenancy.strategy, target)
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
        self.emit(layer, seed_idx, source, target, reason, artifact_id)

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

    def count_fossils(self) -> None:
        """Look up which seeds are FOSSILIZED, after they have become so without an event."""
        self._fossils = set(self.seeds_in(frozenset({SeedState.FOSSILIZED})))

    def seeds_in(self, states: frozenset[SeedState]) -> list[SeedId]:
        return [
            (layer.name, seed_idx)
            for layer in self.layers.values()
            for seed_idx, state in enumerate(layer.state_layout.lifecycle_states())
            if state in states
        ]

    def release(self) -> None:
        """Give every layer the class that it has when it is not observed."""
        self.observed_steps.release()

    def hosts(self) -> list[nn.Module]:
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
        self.loads.close()

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
        }
        for name, value in self.__dict__.items():
            twin.__dict__[name] = fresh[name] if name in fresh else copy.deepcopy(value, memo)
        twin.enrollment = Enrollment(twin.layers)
        return twin

    def seat_at_once(
        self, layer: KasminaLayer, seed_idx: int, kernel: Kernel, state: SeedState, alpha: float
    ) -> None:
        """Lead a DORMANT seed to ``state`` (GRAFTING or later), from where it is moved by hand."""
        tenancy = Tenancy(layer, seed_idx, kernel.artifact_id, alpha=alpha)
        self._admit(tenancy, "from a state_dict")
        layer.await_kernel(seed_idx)
        layer.graft_new(layer.make_seat(seed_idx, kernel, layer.make_room()), None, alpha)
        tenancy.answer(True)
        if state >= SeedState.STABILIZATION:
            layer.stabilize(seed_idx, alpha)
        if state >= SeedState.EVALUATING:
            layer.evaluate(seed_idx)
        if state is SeedState.FINE_TUNING:
            layer.fine_tune(seed_idx, "as in the state_dict")
        if state is SeedState.FOSSILIZED:
            layer.fossilize(seed_idx, "as in the state_dict")

    def follow(self, move: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Go where the model goes: ``move`` is what it applies to its tensors."""
        if device.type != "meta":
            self.bank.move_to(device)
        for layer in self.layers.values():
            layer.follow(move)

    def isolated_seats(self) -> list[Seat]:
        seats = [seat for layer in self.layers.values() for seat in layer.occupants()]
        return [seat for seat in seats if seat.isolated]

    def _admit(self, tenancy: Tenancy, reason: str = "loaded by hand") -> None:
        tenancy.layer.germinate(tenancy.seed_idx, tenancy.artifact_id, reason)
        self.tenancies[tenancy.layer.name, tenancy.seed_idx] = tenancy
        root = self._root()
        if root is not None and not self.compiled_blocks:
            warn_before_limit(root, tenancy.layer.seed_name(tenancy.seed_idx))

    def _admit_remotely(self, tenancy: Tenancy) -> None:
        try:
            self._admit(tenancy)
        except EsperError as error:
            tenancy.settled.set_exception(error)

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
        self.emit(layer, seed_idx, fossilized, fossilized, reason, None)

    def emit(
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
