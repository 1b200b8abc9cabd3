"""The handle of one host layer: its seeds, and the verbs that move them through their lives.

The handle is not an ``nn.Module`` and the layer does not know of it: while all its seeds are
dormant the layer is not touched at all. All methods belong to the training thread, between two
steps, unless they say otherwise.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import esper.kasmina.morph as morph
from esper.contracts import GraftingStrategy, SeedState, SiteSignature
from esper.errors import EsperError, LifecycleError
from esper.kasmina.bank import SeedBank, SeedCells, check_alpha
from esper.kasmina.cache import KernelCache
from esper.kasmina.ensemble import Ensemble
from esper.kasmina.kernel import Kernel
from esper.kasmina.lifecycle import ACTIVE, LEARNING, OCCUPIED, check_edge
from esper.kasmina.observer import Observer
from esper.kasmina.resume import LayerRecord, SeatRecord, ShapesRecord
from esper.kasmina.seat import Chunk, Seat
from esper.kasmina.seats import SEATS, Seats, seats_of
from esper.kasmina.site import (
    SiteShapes,
    SiteType,
    chunk_bounds,
    declared_shapes,
    observed_shapes,
    signature,
)

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina

logger = logging.getLogger(__name__)


class SeedSlice:
    """A layer's part of the seed bank. Reading it never touches the device."""

    def __init__(self, bank: SeedBank, first: int, count: int, layer_name: str):
        self.bank = bank
        self.first = first
        self.count = count
        self.layer_name = layer_name

    def state(self, seed_idx: int) -> SeedState:
        _check_seed(seed_idx, self.count, self.layer_name)
        return self.bank.state(self.first + seed_idx)

    def lifecycle_states(self) -> list[SeedState]:
        return [self.state(seed_idx) for seed_idx in range(self.count)]

    def get_active_seeds(self) -> list[int]:
        """Return the seeds that reach the layer's output: GRAFTING to FOSSILIZED."""
        return [idx for idx, state in enumerate(self.lifecycle_states()) if state in ACTIVE]

    def value(self, field: str, seed_idx: int) -> float:
        """Return one field of one seed from the mirror, for example ``alpha_blend``."""
        _check_seed(seed_idx, self.count, self.layer_name)
        return float(self.bank.mirror[field][self.first + seed_idx])


@dataclass(frozen=True, eq=False)
class _Room:
    """What the seats of a layer share; ``seats`` are on the layer while one of them is occupied."""

    cells: SeedCells
    seats: Seats


class KasminaLayer:
    """Seeds of one host layer.

    Attributes: ``name`` (FQN), ``default_transform`` (the host module), ``num_seeds``,
    ``state_layout`` (its slice of the seed bank), ``kernel_cache``, ``telemetry_enabled``,
    ``shapes`` (None until a forward has shown them).
    """

    def __init__(
        self,
        kasmina: "Kasmina",
        name: str,
        module: nn.Module,
        kind: SiteType,
        first_seed: int,
    ):
        self.kasmina = kasmina
        self.name = name
        self.default_transform = module
        self.host_name = kind.host
        self.kind = kind
        self.shapes = declared_shapes(kind)
        self.first_seed = first_seed
        self.shown = False  # shapes are from a forward, not from the module's attributes
        self.observer = Observer(self)
        self._shown_dtype = torch.get_default_dtype()
        self.num_seeds = self._seeds_that_fit(kasmina.settings.seeds_per_layer)
        self._room: _Room | None = None  # until a seed is to be occupied

    @property
    def state_layout(self) -> SeedSlice:
        return SeedSlice(self.kasmina.bank, self.first_seed, self.num_seeds, self.name)

    @property
    def kernel_cache(self) -> KernelCache:
        return self.kasmina.cache

    @property
    def telemetry_enabled(self) -> bool:
        return self.kasmina.settings.telemetry_enabled

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that kernels here need: the host's, or that of its output if it has none."""
        parameter = self._own_parameter()
        return self._shown_dtype if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device:
        parameter = self._own_parameter()
        return self.kasmina.bank.device if parameter is None else parameter.device

    def _own_parameter(self) -> nn.Parameter | None:
        own = self.default_transform._parameters.values()
        return next((parameter for parameter in own if parameter is not None), None)

    def __repr__(self) -> str:
        states = ", ".join(state.name for state in self.state_layout.lifecycle_states())
        return f"KasminaLayer('{self.name}', {self.host_name}, seeds: {states})"

    def seed_name(self, seed_idx: int) -> str:
        return f"seed {seed_idx} on '{self.name}'"

    def state(self, seed_idx: int) -> SeedState:
        self.check_seed(seed_idx)
        return self.kasmina.bank.state(self.first_seed + seed_idx)

    def check_seed(self, seed_idx: int) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless the layer has such a seed."""
        _check_seed(seed_idx, self.num_seeds, self.name)

    def chunk(self, seed_idx: int) -> tuple[int, int]:
        """Return start and length of a seed's channels."""
        self.check_seed(seed_idx)
        return chunk_bounds(self._known_shapes().channels, self.num_seeds)[seed_idx]

    def site(self, seed_idx: int) -> SiteSignature:
        """Return what a kernel for this seed must fit. Any thread."""
        self.check_seed(seed_idx)
        return signature(self.kind, self._known_shapes(), self.chunk(seed_idx)[1])

    # ------------------------------------------------------------------ loading

    async def load_kernel(self, seed_idx: int, artifact_id: str, *, alpha: float = 0.3) -> bool:
        """Load a kernel by hand: GRAFTING at a fixed ``alpha`` until told to move on.

        Awaited on the training thread, the kernel is in place when this returns; awaited on
        another, the next ``model.step()`` puts it in place. Returns False, and logs one line, if
        the artifact is unknown, not VALIDATED, damaged or made for another site; the host is then
        as it was. Raises ``ValueError`` for a seed index or an alpha out of range,
        :class:`LifecycleError` if the seed is not DORMANT, and :class:`EsperError` if no library is
        connected (in a distributed run that is False like all that one rank alone may lack).
        """
        self.check_seed(seed_idx)
        check_alpha(alpha, self.seed_name(seed_idx))
        return await self.kasmina.load_by_hand(self, seed_idx, artifact_id, alpha)

    def request_germination(
        self,
        seed_idx: int,
        artifact_id: str,
        strategy: GraftingStrategy | None = None,
        *,
        reason: str = "by hand",
    ) -> None:
        """Take a DORMANT seed for a kernel; it is loaded in the background after the next step."""
        self.check_seed(seed_idx)
        strategy = GraftingStrategy() if strategy is None else strategy
        if not isinstance(strategy, GraftingStrategy):
            raise TypeError(
                f"{self.seed_name(seed_idx)}: strategy must be a GraftingStrategy, got {strategy!r}"
            )
        self.kasmina.request(self, seed_idx, artifact_id, strategy, reason)

    def cancel_germination(self, seed_idx: int) -> None:
        """Give up a seed that is GERMINATED or in TRAINING; it is DORMANT again at once."""
        self._move(seed_idx, SeedState.CANCELLED, "cancelled")
        self._vacate(seed_idx)
        self._move(seed_idx, SeedState.DORMANT, "cancelled")

    # ------------------------------------------------------------------ the verbs of a life

    def train(self, seat: Seat, formed: Sequence[Ensemble] = ()) -> None:
        """LOADING > TRAINING: a prepared seat is taken; it learns, the host does not hear it."""
        self._move(seat.seed_idx, SeedState.TRAINING, "kernel loaded", seat.kernel.artifact_id)
        self._occupy(seat).isolate(seat, formed)

    def graft(self, seed_idx: int, strategy: GraftingStrategy) -> None:
        """TRAINING > GRAFTING: alpha ramps from 0 to its target."""
        self._check_state(seed_idx, SeedState.TRAINING, SeedState.GRAFTING)
        check_alpha(strategy.alpha_target, self.seed_name(seed_idx))
        self._move(seed_idx, SeedState.GRAFTING, "trained in isolation")
        self._seats().admit(self._seat(seed_idx))
        self._ramp(seed_idx, strategy)

    def graft_new(
        self,
        seat: Seat,
        strategy: GraftingStrategy | None,
        alpha: float,
        formed: Sequence[Ensemble] = (),
    ) -> None:
        """LOADING > GRAFTING: for fixed functions (with a ramp), and by hand (a fixed alpha)."""
        seed_idx = seat.seed_idx
        self._check_state(seed_idx, SeedState.LOADING, SeedState.GRAFTING)
        check_alpha(alpha if strategy is None else strategy.alpha_target, self.seed_name(seed_idx))
        self._move(seed_idx, SeedState.GRAFTING, "kernel loaded", seat.kernel.artifact_id)
        self._occupy(seat).admit(seat, formed)
        if strategy is None:
            self.kasmina.bank.set_alpha(self.first_seed + seed_idx, alpha)
        else:
            self._ramp(seed_idx, strategy)

    def stabilize(self, seed_idx: int, alpha: float | None = None) -> None:
        """GRAFTING > STABILIZATION: alpha is fixed (at its target, or as given), the seed frozen.

        Raises ``ValueError`` for an alpha outside [0, 1].
        """
        self.check_seed(seed_idx)
        if alpha is not None:
            check_alpha(alpha, self.seed_name(seed_idx))
        self._move(seed_idx, SeedState.STABILIZATION, "alpha reached its target")
        if alpha is None:
            alpha = self.state_layout.value("alpha_target", seed_idx)
        self.kasmina.bank.set_alpha(self.first_seed + seed_idx, alpha)

    def evaluate(self, seed_idx: int) -> None:
        """STABILIZATION > EVALUATING: the next validation measures the seed's contribution."""
        self._move(seed_idx, SeedState.EVALUATING, "ready to be judged")

    def fine_tune(self, seed_idx: int, reason: str = "kept") -> None:
        """EVALUATING > FINE_TUNING: alpha 1, seed and host learn together."""
        self._move(seed_idx, SeedState.FINE_TUNING, reason)
        self.kasmina.bank.set_alpha(self.first_seed + seed_idx, 1.0)

    def keep(self, seed_idx: int, reason: str) -> None:
        """EVALUATING > FINE_TUNING, or > FOSSILIZED if the kernel has nothing to tune."""
        self._check_state(seed_idx, SeedState.EVALUATING, SeedState.FINE_TUNING)
        learns = bool(self._seat(seed_idx).kernel.weights())
        (self.fine_tune if learns else self.fossilize)(seed_idx, reason)

    def fossilize(self, seed_idx: int, reason: str = "done") -> None:
        """EVALUATING or FINE_TUNING > FOSSILIZED: the kernel is part of the network for good."""
        self._move(seed_idx, SeedState.FOSSILIZED, reason)
        self.kasmina.bank.set_alpha(self.first_seed + seed_idx, 1.0)

    def cull(self, seed_idx: int, reason: str) -> None:
        """Any state with a kernel but FOSSILIZED > CULLED: the layer is given back untouched."""
        self._move(seed_idx, SeedState.CULLED, reason)
        self._vacate(seed_idx)

    def roll_back(self, seed_idx: int, reason: str) -> None:
        """Any state that is not final > ROLLED_BACK: as if the host had never heard the seed.

        The layer is given back untouched; weights, buffers and optimizers' states of the host are
        those of the moment before GRAFTING, bit for bit, and the seed is locked. A seed that was
        not heard yet is locked and no more. Training goes on from there: schedulers, random numbers
        and the order of the data are the caller's, and go on. Does not wait for the device. Raises
        :class:`LifecycleError` for a final state, :class:`EsperError` if that state was not kept.
        """
        self.check_seed(seed_idx)
        self.kasmina.roll_back(self, seed_idx, reason)

    def lock(self, seed_idx: int, reason: str) -> None:
        """Any state that is not final > ROLLED_BACK, for :meth:`roll_back`."""
        self._move(seed_idx, SeedState.ROLLED_BACK, reason)
        self._vacate(seed_idx)

    def evict(self, seed_idx: int) -> None:
        """Give the layer back whatever the seed's state, since its bank is about to go."""
        self._vacate(seed_idx)

    def revive(self, seed_idx: int) -> None:
        """CULLED > DORMANT: the embargo is over."""
        self._move(seed_idx, SeedState.DORMANT, "embargo is over")

    def germinate(self, seed_idx: int, artifact_id: str, reason: str) -> None:
        """DORMANT > GERMINATED: the seed is taken."""
        self._move(seed_idx, SeedState.GERMINATED, reason, artifact_id)

    def await_kernel(self, seed_idx: int) -> None:
        """GERMINATED > LOADING: its kernel is being prepared."""
        self._move(seed_idx, SeedState.LOADING, "kernel is being prepared")

    def reject_kernel(self, seed_idx: int, error: BaseException) -> None:
        """LOADING > CULLED > DORMANT: no kernel came; the seed's error count rises by one.

        Without an embargo: that a load failed says nothing about the place.
        """
        self._check_state(seed_idx, SeedState.LOADING, SeedState.CULLED)
        bank, index = self.kasmina.bank, self.first_seed + seed_idx
        bank.write("error_count", index, bank.mirror["error_count"][index] + 1)
        logger.error("%s: kernel not loaded: %s", self.seed_name(seed_idx), error)
        reason = f"{type(error).__name__}: {error}"
        self._move(seed_idx, SeedState.CULLED, reason)
        self._move(seed_idx, SeedState.DORMANT, "nothing was loaded")

    @contextlib.contextmanager
    def silenced(self, seed_idx: int) -> Iterator[None]:
        """Run the block with the seed's alpha at 0: the counterfactual of its contribution."""
        self.check_seed(seed_idx)
        with self.kasmina.bank.silenced(self.first_seed + seed_idx):
            yield

    def kernel(self, seed_idx: int) -> Kernel | None:
        """Return the kernel in a seed's place, or None."""
        self.check_seed(seed_idx)
        seats = seats_of(self.default_transform)
        seat = None if seats is None else seats.occupant(seed_idx)
        return None if seat is None else seat.kernel

    def quarantine_reason(self, seed_idx: int) -> str | None:
        """Return why the seed was taken out of the output for good, or None if it was not."""
        if not self.kasmina.bank.mirror["fallback_active"][self.first_seed + seed_idx]:
            return None
        failure = self._seat(seed_idx).failure
        if failure:
            return f"its kernel raised {failure}"
        steps = int(self.state_layout.value("error_count", seed_idx))
        if steps < self.kasmina.settings.max_errors:  # not by tick, but by SeedCells.quarantine
            return "its kernel raised an error on another rank"
        return f"non-finite numbers in {steps} steps"

    def is_bypassed(self, seed_idx: int) -> bool:
        """Whether the seed's kernel is in its place and no longer run."""
        return self._seat(seed_idx).bypassed

    def bypass(self, seed_idx: int) -> None:
        """Stop running a FOSSILIZED kernel whose output is quarantined."""
        self._seat(seed_idx).bypassed = True
        self.kasmina.num_transitions += 1
        self._seats().rearrange()

    # ------------------------------------------------------------------ checkpoints

    def capture(self) -> LayerRecord:
        """Return what a checkpoint says of this layer beside tensors."""
        return LayerRecord(
            name=self.name,
            host=self.host_name,
            num_seeds=self.num_seeds,
            shapes=self._captured_shapes(),
            seats=tuple(_captured_seat(seat) for seat in self.occupants()),
        )

    def site_in(self, record: LayerRecord, seed_idx: int) -> SiteSignature:
        """Return what a kernel for a seed must fit, by a checkpoint's record of this layer."""
        assert record.shapes is not None
        shapes = record.shapes.site_shapes()
        _, length = chunk_bounds(shapes.channels, record.num_seeds)[seed_idx]
        return signature(self.kind, shapes, length)

    def restore(self, record: LayerRecord, kernels: dict[int, Kernel]) -> None:
        """Seat ``kernels`` (by seed index) as recorded; the bank is already what it was."""
        self.num_seeds = record.num_seeds
        if record.shapes is not None:
            self.shapes = record.shapes.site_shapes()
            self.shown = record.shapes.observed
            self._shown_dtype = getattr(torch, record.shapes.dtype)
            self.rest()
        for saved in record.seats:
            self._restore_seat(saved, kernels[saved.seed_idx])

    def _captured_shapes(self) -> ShapesRecord | None:
        if self.shapes is None:
            return None
        return ShapesRecord(
            inp=self.shapes.inp,
            out=self.shapes.out,
            channel_dim=self.shapes.channel_dim,
            shares_positions=self.shapes.shares_positions,
            observed=self.shown,
            dtype=str(self._shown_dtype).removeprefix("torch."),
        )

    def _restore_seat(self, saved: SeatRecord, kernel: Kernel) -> None:
        seat = self.make_seat(saved.seed_idx, kernel, self.make_room())
        seat.bypassed, seat.failure = saved.bypassed, saved.failure
        seat.learns = self.state(saved.seed_idx) in LEARNING
        for name, parameter in kernel.named_parameters():
            parameter.requires_grad_(name not in saved.frozen)
        seats = self._place(seat)
        (seats.isolate if saved.isolated else seats.admit)(seat)
        self.kasmina.count_in(seat)

    # ------------------------------------------------------------------ observation

    def arm(self) -> None:
        """Let the next forwards be seen by the layer's observer."""
        morph.watch([self.default_transform], [self.observer])

    def rest(self) -> None:
        """Give the layer the class that it has when it is not observed."""
        morph.lend_class(self.default_transform)

    def learn_shapes(self, inp: Tensor, out: Tensor) -> None:
        """Take the first forward's shapes for good: kernels are made for them."""
        if self.shown:
            return
        shapes = observed_shapes(self.kind, inp, out)
        if shapes is None:
            return
        if self.shapes is not None and self.shapes.channels != shapes.channels:
            return
        self.shown = True
        self.shapes = shapes
        if not torch.is_autocast_enabled(out.device.type):
            self._shown_dtype = out.dtype
        self.num_seeds = self._seeds_that_fit(self.num_seeds)

    # ------------------------------------------------------------------ seats

    def rearrange(self) -> None:
        """Have the seats compute together again, after their weights were given other memory."""
        seats = seats_of(self.default_transform)
        if seats is not None:
            seats.rearrange()

    def occupants(self) -> list[Seat]:
        seats = seats_of(self.default_transform)
        return [] if seats is None else seats.occupants()

    def _seats(self) -> Seats:
        seats = seats_of(self.default_transform)
        assert seats is not None
        return seats

    def _seat(self, seed_idx: int) -> Seat:
        seat = self._seats().occupant(seed_idx)
        assert seat is not None
        return seat

    def _occupy(self, seat: Seat) -> Seats:
        """Tell everybody but the module tree of a seat that is about to join the layer's."""
        seats = self._place(seat)
        bank, index = self.kasmina.bank, self.first_seed + seat.seed_idx
        bank.write("active_kernel_id", index, int(seat.kernel.artifact_id[:15], 16))
        bank.write("error_count", index, 0)
        bank.write("fault", index, 0)
        self.kasmina.seat_taken(self, seat)
        return seats

    def _place(self, seat: Seat) -> Seats:
        """Return the seats of a layer that is ready to let ``seat`` speak among them."""
        if seat.training is not self.default_transform.training:
            seat.train(self.default_transform.training)
        seats = seats_of(self.default_transform)
        if seats is None:
            assert self._room is not None
            seats = self._room.seats
            if seats.training is not self.default_transform.training:
                seats.training = self.default_transform.training
            self.default_transform._modules[SEATS] = seats
        self.rest()
        return seats

    def make_seat(self, seed_idx: int, kernel: Kernel, cells: SeedCells) -> Seat:
        """Return a seat for the kernel, in nobody's place yet; ``cells`` are the layer's. Any thread."""
        chunk = Chunk(self.kind.channel_dim, self._known_shapes().channels, *self.chunk(seed_idx))
        return Seat(self.seed_name(seed_idx), seed_idx, kernel, cells, chunk)

    def make_room(self) -> SeedCells:
        """Make what the first seat needs before it can be prepared, and return the cells.

        They are the same for all seats: a compiler that sees two tensors with the same memory, of
        which one is written to, gives up.
        """
        if self._room is None:
            cells = SeedCells(self.kasmina.bank, self.first_seed, self.num_seeds)
            self._room = _Room(cells, Seats())
        return self._room.cells

    def follow(self, move: Callable[[Tensor], Tensor]) -> None:
        """Go where the model goes: ``move`` is what it applies to its tensors."""
        if self._room is not None:
            self._room.cells.refresh()
        for seat in self.occupants():
            if seat.isolated:  # the others are in the module tree
                seat._apply(move)  # type: ignore[no-untyped-call]
        self.rearrange()

    def _vacate(self, seed_idx: int) -> None:
        self.kasmina.bank.clear(self.first_seed + seed_idx)
        seats = seats_of(self.default_transform)
        seat = None if seats is None else seats.occupant(seed_idx)
        if seats is None or seat is None:
            return
        seats.remove(seed_idx)
        if not seats.occupants():
            del self.default_transform._modules[SEATS]
            self.rest()
        self.kasmina.seat_given_back(seat)

    def _ramp(self, seed_idx: int, strategy: GraftingStrategy) -> None:
        self.kasmina.bank.start_ramp(
            self.first_seed + seed_idx,
            strategy.alpha_target,
            strategy.grafting_steps,
            strategy.curve,
        )

    def _check_state(self, seed_idx: int, only_source: SeedState, target: SeedState) -> None:
        """Refuse the verbs that take one of several edges to ``target`` on all the others."""
        source = self.state(seed_idx)
        if source is not only_source:
            raise LifecycleError(
                f"{self.seed_name(seed_idx)}: no edge {source.name} > {target.name} by this call, "
                f"only {only_source.name} > {target.name}"
            )

    def _move(
        self, seed_idx: int, target: SeedState, reason: str, artifact_id: str | None = None
    ) -> None:
        source = self.state(seed_idx)
        check_edge(source, target, self.seed_name(seed_idx))
        bank, index = self.kasmina.bank, self.first_seed + seed_idx
        bank.write("lifecycle_states", index, target)
        bank.write("last_update_epoch", index, self.kasmina.epoch)
        if source in OCCUPIED and target in OCCUPIED:
            self._seat(seed_idx).let_learn(target in LEARNING)
        self.kasmina.record_transition(self, seed_idx, source, target, reason, artifact_id)

    def _known_shapes(self) -> SiteShapes:
        if self.shapes is None:
            raise EsperError(
                f"layer '{self.name}' ({self.host_name}) has shown no output yet, so its width is "
                f"unknown; {self.observer.trouble or 'run one forward first'}"
            )
        return self.shapes

    def _seeds_that_fit(self, wanted: int) -> int:
        if self.shapes is None or self.shapes.channels >= wanted:
            return wanted
        logger.warning(
            "layer '%s' has %d channels and gets as many seeds, not %d",
            self.name,
            self.shapes.channels,
            wanted,
        )
        return self.shapes.channels


def _check_seed(seed_idx: int, num_seeds: int, layer_name: str) -> None:
    if isinstance(seed_idx, bool) or not isinstance(seed_idx, int):
        raise TypeError(f"seed index must be an int, got {seed_idx!r}")
    if not 0 <= seed_idx < num_seeds:
        raise ValueError(
            f"Invalid seed index: {seed_idx} (layer '{layer_name}' has seeds 0 to {num_seeds - 1})"
        )


def _captured_seat(seat: Seat) -> SeatRecord:
    parameters = seat.kernel.named_parameters()
    return SeatRecord(
        seed_idx=seat.seed_idx,
        artifact_id=seat.kernel.artifact_id,
        isolated=seat.isolated,
        bypassed=seat.bypassed,
        failure=seat.failure,
        frozen=tuple(name for name, parameter in parameters if not parameter.requires_grad),
    )
