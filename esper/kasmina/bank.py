"""The seed bank: the state of all seeds of a model, as a structure of arrays on its device.

The *mirror* is a block of host memory (``csrc/seed_layout.h``) from which Python decides. The
*arena* is the same layout on the device, which ops read and write. On the CPU they are one and
the same memory; on CUDA the host's writes go to both, and what the device decided comes to the
mirror by a *refresh*, some steps late. Statistics come to the host by snapshots alone.
"""

import contextlib
import copy
import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import esper.ops as ops
from esper._host import SeedBlock
from esper.contracts import RampCurve, SeedState
from esper.kasmina.transfer import PendingCopy, host_bytes

Layout = dict[str, tuple[int, str, tuple[int, ...]]]  # offset in bytes, dtype, shape

_STATES = {state.value: state for state in SeedState}  # looked up faster than an enum finds them
_FORMATS = {"int64": "q", "float32": "f", "int32": "i", "uint8": "B"}
# Written by ``tick`` and the blending ops, for seeds in TRAINING to FOSSILIZED. All other fields
# are written by the host alone, but for the health accumulator.
_DEVICE_FIELDS = (
    "alpha_blend",
    "alpha_slope",
    "ramp_progress",
    "error_count",
    "fallback_active",
    "fault",
)
_SPARE_BUFFERS = 2  # one for the snapshot under way while a consumer still reads the last


class SeedBank:
    """State of ``num_seeds`` seeds. All methods belong to the training thread."""

    def __init__(self, num_seeds: int, device: torch.device):
        self.num_seeds = num_seeds
        self.block = SeedBlock(num_seeds)
        self._layout: Layout = self.block.fields()
        memory = memoryview(self.block)
        self.mirror: dict[str, memoryview[float]] = {
            name: memory[offset : offset + _nbytes(dtype, shape)].cast(_FORMATS[dtype])  # type: ignore[call-overload]
            for name, (offset, dtype, shape) in self._layout.items()
        }
        self._host_arena = torch.frombuffer(self.block, dtype=torch.uint8)
        self._written: set[int] = set()  # seeds that the host wrote to since the refresh began
        self._unsent: dict[int, int] | None = None  # byte offset -> size, of writes held back
        self._settle(device)

    def _settle(self, device: torch.device) -> None:
        """Take up residence on a device, with what the mirror holds."""
        self.device = device
        self.arena = arena_on(device, self._host_arena)
        self._is_far = self.arena is not self._host_arena
        # As tensors of their own: autograd and compilers need not know that two fields lie in one
        # arena, and refuse some views of one that are of different dtypes.
        views = typed_views(self.arena, self._layout)
        self.fields = {name: torch.utils.dlpack.from_dlpack(view) for name, view in views.items()}
        self._spare: deque[_Buffer] = deque(maxlen=_SPARE_BUFFERS)
        self._snapshot: tuple[_Buffer, PendingCopy] | None = None
        self._refresh: PendingCopy | None = None
        self._landing: Tensor | None = None

    # ------------------------------------------------------------------ what the host writes

    def write(self, field: str, index: int, value: float) -> None:
        """Set one field of one seed in the mirror and, without waiting, on the device.

        Raises ``IndexError`` for a seed that is none.
        """
        self._check_index(index)
        self.mirror[field][index] = value
        if self._is_far:
            self._send(field, index, value)

    def writes_together(self) -> "_WritesTogether":
        """Let the writes of a block reach the device at its end, by one copy for all of them."""
        return _WritesTogether(self)

    def _hold_back(self) -> None:
        self._unsent = {}

    def _send_held_back(self) -> None:
        unsent, self._unsent = self._unsent, None
        if unsent:
            self._send_bytes(unsent)

    def _send(self, field: str, index: int, value: float) -> None:
        self._written.add(index)
        if self._unsent is None:
            # A fill carries its value along, so that a CUDA graph may capture it.
            self.fields[field][index].fill_(value)
        else:
            offset, dtype, _ = self._layout[field]
            size = getattr(torch, dtype).itemsize
            self._unsent[offset + index * size] = size

    def _send_bytes(self, sizes: dict[int, int]) -> None:
        """Copy these bytes of the mirror to the arena: positions and bytes travel as one."""
        positions = [at for begin, size in sizes.items() for at in range(begin, begin + size)]
        split = 8 * len(positions)
        letter = host_bytes(split + len(positions), self.device)
        where = letter[:split].view(torch.int64).copy_(torch.tensor(positions))
        letter[split:] = self._host_arena[where]
        sent = letter.to(self.device, non_blocking=True)
        self.arena.index_copy_(0, sent[:split].view(torch.int64), sent[split:])

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_seeds:
            raise IndexError(f"seed index must lie in [0, {self.num_seeds - 1}], got {index}")

    def state(self, index: int) -> SeedState:
        return _STATES[self.block.state(index)]

    def set_alpha(self, index: int, alpha: float) -> None:
        """Fix alpha; a running ramp ends. Raises ``ValueError`` for one outside [0, 1]."""
        check_alpha(alpha, f"seed {index} of the bank")
        self.write("alpha_slope", index, 0.0)
        self.write("alpha_target", index, alpha)
        self.write("alpha_blend", index, alpha)

    def start_ramp(self, index: int, target: float, num_steps: int, curve: RampCurve) -> None:
        """Let ``tick`` move alpha from 0 to ``target`` over the next ``num_steps`` steps.

        Raises ``ValueError`` for a target outside [0, 1] or less than one step.
        """
        check_alpha(target, f"seed {index} of the bank")
        if num_steps < 1:
            raise ValueError(
                f"seed {index} of the bank: num_steps must be at least 1, got {num_steps}"
            )
        self.write("alpha_blend", index, 0.0)
        self.write("alpha_target", index, target)
        self.write("ramp_curve", index, curve)
        self.write("ramp_progress", index, 0.0)
        self.write("alpha_slope", index, 1.0 / num_steps)

    def clear(self, index: int) -> None:
        """Forget kernel, alpha and faults of a seed; its error count stays until the next kernel."""
        self.set_alpha(index, 0.0)
        for field in ("active_kernel_id", "fallback_active", "fault"):
            self.write(field, index, 0)

    @contextlib.contextmanager
    def silenced(self, index: int) -> Iterator[None]:
        """Run the block with a seed's alpha at 0; the device, which may move it, keeps it."""
        self._check_index(index)
        alpha = self.fields["alpha_blend"][index]
        kept = alpha.clone()
        alpha.zero_()
        try:
            yield
        finally:
            alpha.copy_(kept)

    def reset_health(self) -> None:
        """Start the statistics of an observed step."""
        self.fields["health_accumulator"].zero_()

    # ------------------------------------------------------------------ what the device decides

    def tick(self, max_errors: int) -> None:
        """Advance all ramps by one step and quarantine seeds with ``max_errors`` faulty steps."""
        ops.tick(self.arena, self.num_seeds, max_errors)

    def begin_refresh(self) -> None:
        """Start copying what the device has decided on to the host; never waits.

        Does nothing on the CPU, nor while an earlier refresh is on its way.
        """
        if not self._is_far or self._refresh is not None:
            return
        begin, end = _span(self._layout, _DEVICE_FIELDS)
        if self._landing is None:
            self._landing = host_bytes(end - begin, self.device)
        self._written.clear()
        self._refresh = PendingCopy(self.arena[begin:end], self._landing)

    def finish_refresh(self) -> None:
        """Bring the mirror up to date once a refresh has completed; never waits.

        A seed that the host wrote to meanwhile is left for the next one, since what was copied of
        it is older than the write.
        """
        if self._refresh is None or not self._refresh.completed():
            return
        self._refresh = None
        assert self._landing is not None
        begin, _ = _span(self._layout, _DEVICE_FIELDS)
        known = typed_views(self._host_arena, self._layout)
        seeds = self._refreshable(known["lifecycle_states"])
        for field in _DEVICE_FIELDS:
            offset, dtype, shape = self._layout[field]
            news = self._landing[offset - begin :][: _nbytes(dtype, shape)].view(known[field].dtype)
            known[field][seeds] = news[seeds]

    def _refreshable(self, states: Tensor) -> Tensor:
        occupied = (states >= SeedState.TRAINING) & (states <= SeedState.FOSSILIZED)
        occupied[list(self._written)] = False
        return occupied.nonzero().squeeze(1)

    # ------------------------------------------------------------------ snapshots

    def begin_snapshot(self) -> None:
        """Start copying the whole bank to the host; never waits."""
        if self._snapshot is None:
            buffer = self._spare.pop() if self._spare else self._new_buffer()
            self._snapshot = buffer, PendingCopy(self.arena, buffer.bytes)

    @property
    def snapshot_pending(self) -> bool:
        return self._snapshot is not None

    def take_snapshot(self) -> "Snapshot | None":
        """Return the snapshot once its copy has completed, else None; never waits."""
        if self._snapshot is None or not self._snapshot[1].completed():
            return None
        buffer, _ = self._snapshot
        self._snapshot = None
        snapshot = Snapshot(buffer.fields, self.num_seeds)
        weakref.finalize(snapshot, self._spare.append, buffer).atexit = False
        return snapshot

    def _new_buffer(self) -> "_Buffer":
        memory = host_bytes(self.block.nbytes, self.device)
        return _Buffer(memory, typed_views(memory, self._layout))

    # ------------------------------------------------------------------ moving and copying

    def capture(self) -> dict[str, Tensor]:
        """Return copies of all fields, as the host sees them and, on CUDA, as the device does.

        Synchronises with the device.
        """
        views = {"host": typed_views(self._host_arena, self._layout)}
        if self._is_far:
            views["device"] = self.fields
        return {
            f"{side}/{field}": view[..., : self.num_seeds].cpu().clone()
            for side, fields in views.items()
            for field, view in fields.items()
        }

    def restore(self, captured: dict[str, Tensor]) -> None:
        """Take on what :meth:`capture` returned, of a bank of as many seeds on any device."""
        mirror = typed_views(self._host_arena, self._layout)
        for field in self._layout:
            on_host = captured[f"host/{field}"]
            on_device = captured.get(f"device/{field}", on_host)
            mirror[field][..., : self.num_seeds] = on_host if self._is_far else on_device
            if self._is_far:
                self.fields[field][..., : self.num_seeds] = on_device.to(self.device)

    @property
    def refresh_pending(self) -> bool:
        return self._refresh is not None

    def move_to(self, device: torch.device) -> None:
        """Follow the model to another device; cells have to be refreshed. Waits for the copy."""
        if device == self.device:
            return
        if self._is_far:
            self._host_arena.copy_(self.arena)
        self._settle(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedBank":
        twin = SeedBank(self.num_seeds, self.device)
        memo[id(self)] = twin
        twin._host_arena.copy_(self._host_arena)
        if self._is_far:
            twin.arena.copy_(self.arena)
        return twin


class _WritesTogether:
    """See :meth:`SeedBank.writes_together`; a generator would cost each step a microsecond."""

    __slots__ = ("bank",)

    def __init__(self, bank: SeedBank):
        self.bank = bank

    def __enter__(self) -> None:
        self.bank._hold_back()

    def __exit__(self, *error: object) -> None:
        self.bank._send_held_back()


class SeedCells:
    """One layer's views into the bank, as ops take them: one entry a seed, on the device."""

    __slots__ = ("_counters", "alpha", "bank", "count", "fault", "first", "non_finite")

    def __init__(self, bank: SeedBank, first: int, count: int):
        self.bank = bank
        self.first = first
        self.count = count
        self.refresh()

    def refresh(self) -> None:
        """Take the views anew, after the bank has moved."""
        # Through .data each has a version counter of its own. The arena's would tell compiled code,
        # which saves alpha for its backward pass, of every change to any other cell.
        seeds = slice(self.first, self.first + self.count)
        self.alpha = self.bank.fields["alpha_blend"][seeds].data  # (count,) float32
        self.fault = self.bank.fields["fault"][seeds].data  # (count,) uint8
        self.non_finite = self.bank.fields["health_accumulator"][4, seeds].data  # (count,) float32
        self._counters = [self._sliced(seed_idx) for seed_idx in range(self.count)]

    def counters(self, seed_idx: int) -> tuple[Tensor, Tensor]:
        """Return ``non_finite`` and ``fault`` of one seed, (1,) each."""
        # A compiler must see them come from the layer's, with which they share memory.
        if torch.compiler.is_compiling():
            return self._sliced(seed_idx)
        return self._counters[seed_idx]

    def _sliced(self, seed_idx: int) -> tuple[Tensor, Tensor]:
        one = slice(seed_idx, seed_idx + 1)
        return self.non_finite[one], self.fault[one]

    def quarantine(self, seed_idx: int) -> None:
        """Take a seed out of the output for good, for an error that the host saw."""
        index = self.first + seed_idx
        self.bank.write("error_count", index, self.bank.mirror["error_count"][index] + 1)
        self.bank.write("fallback_active", index, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedCells":
        # Views are made anew: copied ones would not belong to the copied bank's block.
        return SeedCells(copy.deepcopy(self.bank, memo), self.first, self.count)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A consistent copy of all fields in host memory, taken between two steps.

    ``fields`` stay as they are while somebody holds the snapshot itself, on whatever thread;
    afterwards the bank takes their memory for another one.
    """

    fields: dict[str, Tensor]
    num_seeds: int


@dataclass(frozen=True, eq=False)
class _Buffer:
    bytes: Tensor
    fields: dict[str, Tensor]  # views of the bytes


def check_alpha(alpha: float, seed: str) -> None:
    """Raise ``ValueError`` unless ``alpha`` lies in [0, 1]; ``seed`` names whose it is."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"{seed}: alpha must lie in [0, 1], got {alpha}")


def arena_on(device: torch.device, mirror: Tensor) -> Tensor:
    """Return the bank's bytes on its device; on the CPU that is the mirror itself."""
    return mirror if device.type == "cpu" else mirror.to(device)


def typed_views(arena: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {
        name: arena[offset : offset + _nbytes(dtype, shape)].view(getattr(torch, dtype)).view(shape)
        for name, (offset, dtype, shape) in layout.items()
    }


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(getattr(torch, dtype).itemsize) * math.prod(shape)


def _span(layout: Layout, fields: tuple[str, ...]) -> tuple[int, int]:
    """Return where the bytes begin and end that hold these fields, and what lies between them."""
    places = [layout[field] for field in fields]
    begin = min(offset for offset, _, _ in places)
    return begin, max(offset + _nbytes(dtype, shape) for offset, dtype, shape in places)
