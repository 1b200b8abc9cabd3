"""The execution layers of all ranks of a distributed run, moving their seeds in lockstep.

Rank 0 decides. Each step begins with one small collective, in which rank 0 announces what it has to
say and the ranks compare what their seeds have gone through so far. Everything else follows from
that: seeds that all have moved alike want the same votes and the same reductions.
"""

import zlib
from collections import deque
from concurrent.futures import wait
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from esper.contracts import Contract, KasminaControlCommand, SeedId, SeedState
from esper.errors import DistributedError, EsperError
from esper.kasmina.control_group import ControlGroup
from esper.kasmina.gradients import GradientAverage
from esper.kasmina.kernel import Kernel
from esper.kasmina.operators import operator
from esper.kasmina.tenancy import Tenancy

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina

# A rank's vote on a load, of which the largest counts. From _FAILED on it also names the rank.
_READY, _PENDING, _FAILED = 0, 1, 2
_REASON_BYTES = 1024
_DEVICE_DECISIONS = ("fault", "fallback_active", "error_count")


class Directive(Contract):
    """What rank 0 has all ranks do in one step."""

    quarantined: tuple[tuple[SeedId, str], ...]  # with the reason
    commands: tuple[KasminaControlCommand, ...]


class Peers:
    """One rank's part in the agreement. Training thread, but for :meth:`submit`."""

    def __init__(
        self, kasmina: "Kasmina", control: ControlGroup, process_group: dist.ProcessGroup
    ) -> None:
        self.control = control
        self.leads = control.rank == 0
        self.gradients = GradientAverage(kasmina, process_group)
        self.undo = ExitStack()  # what was done to the model for this
        self._kasmina = kasmina
        self._process_group = process_group  # that of the gradients, on the seeds' device
        self._submitted: deque[KasminaControlCommand] = deque()
        self._history = 0  # checksum of all transitions
        self._places: tuple[int, Tensor] | None = None

    def submit(self, command: KasminaControlCommand) -> None:
        """Have all ranks obey a command at the same step boundary. Any thread of rank 0.

        Raises :class:`DistributedError` on the others.
        """
        if not self.leads:
            raise DistributedError(
                f"rank {self.control.rank} follows: commands are submitted on rank 0 "
                f"(got {command.kind} for seed {command.seed_idx} on '{command.layer_name}')"
            )
        self._submitted.append(command)

    def submitted(self) -> list[KasminaControlCommand]:
        """Return the commands that wait for the next step."""
        return [*self._submitted.copy()]

    def note(self, seed_id: SeedId, target: SeedState) -> None:
        """Take a transition into what the ranks compare."""
        self._history = zlib.crc32(f"{seed_id} {target}".encode(), self._history)

    def leave(self) -> None:
        """Part with the model and the other ranks."""
        self.undo.close()

    # ------------------------------------------------------------------ at each step

    def meet(self) -> None:
        """Put into the inbox of each rank what rank 0 has to say.

        Raises :class:`DistributedError` on every rank if their seeds have moved apart.
        """
        kasmina = self._kasmina
        letter = self._letter() if self.leads else b""
        epoch = kasmina.epoch if self.leads else -1
        num_bytes, epoch, largest, smallest = self.control.maxima(
            [len(letter), epoch, self._history, -self._history]
        )
        if largest != -smallest:
            raise DistributedError(
                f"step {kasmina.step_count}: the seeds of the ranks have not gone through the "
                "same; what moves them by hand must be called on every rank between the same steps"
            )
        kasmina.epoch = epoch
        if num_bytes:
            letter = self.control.broadcast(letter, num_bytes)
            self._open(Directive.model_validate_json(letter))

    def _letter(self) -> bytes:
        """Return the directive, which takes the submitted commands along, or nothing."""
        quarantined = tuple(self._kasmina.quarantined())
        commands = tuple(self._submitted.popleft() for _ in range(len(self._submitted)))
        if not quarantined and not commands:
            return b""
        directive = Directive(quarantined=quarantined, commands=commands)
        return directive.model_dump_json().encode()

    def _open(self, directive: Directive) -> None:
        kasmina = self._kasmina
        for seed_id, reason in directive.quarantined:
            kasmina.inbox.append(partial(kasmina.take_out, seed_id, reason))
        for command in directive.commands:
            kasmina.inbox.append(partial(kasmina.commands.obey, command))

    def settle_loads(self) -> None:
        """Put those kernels in place that all ranks have ready, and give up those that one lacks."""
        loading = self._kasmina.loads.under_way()
        for tenancy in loading:
            prepared = tenancy.prepared or self._kasmina.loads.prepare(tenancy)
            if self._kasmina.deterministic:
                wait([prepared])
        self._vote(loading)

    def load_now(self, tenancy: Tenancy) -> None:
        """Load a kernel and put it in place on all ranks, each of which calls this. Waits."""
        wait([self._kasmina.loads.prepare(tenancy)])
        self._vote([tenancy])

    def _vote(self, loading: list[Tenancy]) -> None:
        if not loading:
            return
        obstacles = [self._obstacle(tenancy) for tenancy in loading]
        votes = self.control.maxima([self._ballot(obstacle) for obstacle in obstacles])
        for tenancy, vote, obstacle in zip(loading, votes, obstacles, strict=True):
            if vote == _READY:
                self._kasmina.loads.conclude(tenancy, None)
            elif vote >= _FAILED:
                self._kasmina.loads.conclude(tenancy, self._told_by(vote - _FAILED, obstacle))

    def _obstacle(self, tenancy: Tenancy) -> BaseException | int:
        """Return what speaks against taking the kernel in here, or a vote without a reason."""
        assert tenancy.prepared is not None
        if not tenancy.prepared.done():
            return _PENDING
        if not tenancy.fits:
            obstacle = self._kasmina.loads.obstacle(tenancy)
            if obstacle is not None:
                return obstacle
            tenancy.fits = True  # it may be long until the others are ready
        return _READY

    def _ballot(self, obstacle: BaseException | int) -> int:
        return obstacle if isinstance(obstacle, int) else _FAILED + self.control.rank

    def _told_by(self, rank: int, obstacle: BaseException | int) -> EsperError:
        """Have a rank that failed tell all why."""
        reason = f"{type(obstacle).__name__}: {obstacle}".encode()[:_REASON_BYTES]
        told = self.control.broadcast(reason, _REASON_BYTES, rank)
        return EsperError(f"rank {rank}: {told.rstrip(bytes(1)).decode(errors='ignore')}")

    # ------------------------------------------------------------------ on the device

    def share_device_state(self) -> None:
        """Have what one device has noticed noticed by all, before they act on it.

        Faults are those of any rank. What kernels track beside weights, as batch norms do, is that
        of rank 0, as with DDP. Queued on the device and not waited for.
        """
        bank = self._kasmina.bank
        places = self._occupied_places()
        fields = [bank.fields[name] for name in _DEVICE_DECISIONS]
        shared = torch.stack([field.index_select(0, places).int() for field in fields])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._process_group)
        for field, values in zip(fields, shared, strict=True):
            field.index_copy_(0, places, values.to(field.dtype))
        for kernel in self._kernels():
            if _writes_buffers(kernel):
                self._take_from_first(list(kernel.buffers()))

    def share_kernels(self) -> None:
        """Let the kernels in place be those of rank 0, as DDP does with the host."""
        for kernel in self._kernels():
            self._take_from_first([*kernel.parameters(), *kernel.buffers()])

    def _take_from_first(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=self._process_group, group_src=0)

    def _kernels(self) -> list[Kernel]:
        layers = self._kasmina.layers.values()
        return [seat.kernel for layer in layers for seat in layer.occupants()]

    def _occupied_places(self) -> Tensor:
        """Return where the occupied seeds are in the bank, on its device."""
        kasmina = self._kasmina
        if self._places is None or self._places[0] != kasmina.num_transitions:
            places = [
                layer.first_seed + seat.seed_idx
                for layer in kasmina.layers.values()
                for seat in layer.occupants()
            ]
            on_device = torch.tensor(places).to(kasmina.bank.device, non_blocking=True)
            self._places = kasmina.num_transitions, on_device
        return self._places[1]


def _writes_buffers(kernel: Kernel) -> bool:
    program = kernel.program
    return bool(program.buffers) and any(operator(n.op).written for n in program.train.nodes)
