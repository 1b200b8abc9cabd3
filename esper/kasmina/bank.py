"""The seed bank: the state of all seeds of a model, as a structure of arrays on its device.

The *mirror* is a block of host memory (``csrc/seed_layout.h``) from which Python decides. The
*arena* is the same layout on the device, which ops read and write. On the CPU they are one and
the same memory; on CUDA the mirror learns what the device wrote through snapshots.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import esper.ops as ops
from esper._host import SeedBlock
from esper.contracts import RampCurve, SeedState

_FORMATS = {"int64": "q", "float32": "f", "int32": "i", "uint8": "B"}
# Written by ops on the device; all other fields are written by the host alone.
_DEVICE_FIELDS = (
    "health_accumulator",
    "alpha_blend",
    "alpha_slope",
    "ramp_progress",
    "error_count",
    "fallback_active",
    "fault",
)


class SeedBank:
    """State of ``num_seeds`` seeds. All methods belong to the training thread."""

    def __init__(self, num_seeds: int, device: torch.device):
        self.num_seeds = num_seeds
        self.device = device
        self.block = SeedBlock(num_seeds)
        memory = memoryview(self.block)
        self.mirror: dict[str, memoryview[float]] = {
            name: memory[offset : offset + _nbytes(dtype, shape)].cast(_FORMATS[dtype])  # type: ignore[call-overload]
            for name, (offset, dtype, shape) in self.block.fields().items()
        }
        self._host_arena = torch.frombuffer(self.block, dtype=torch.uint8)
        on_host = device.type == "cpu"
        self.arena = self._host_arena if on_host else self._host_arena.to(device)
        self.fields = _typed_views(self.arena, self.block.fields())
        self._writes = 0  # a snapshot older than the last write does not refresh the mirror
        self._pending: _PendingSnapshot | None = None

    def write(self, field: str, index: int, value: float) -> None:
        """Set one field of one seed in the mirror and, without waiting, on the device."""
        self.mirror[field][index] = value
        self._writes += 1
        if self.arena is not self._host_arena:
            self.fields[field][index].fill_(value)

    def state(self, index: int) -> SeedState:
        return SeedState(self.block.state(index))

    def set_alpha(self, index: int, alpha: float) -> None:
        """Fix alpha; a running ramp ends."""
        self.write("alpha_slope", index, 0.0)
        self.write("alpha_target", index, alpha)
        self.write("alpha_blend", index, alpha)

    def start_ramp(self, index: int, target: float, num_steps: int, curve: RampCurve) -> None:
        """Let ``tick`` move alpha from 0 to ``target`` over the next ``num_steps`` steps."""
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

    def reset_health(self) -> None:
        """Start the statistics of an observed step."""
        self.fields["health_accumulator"].zero_()

    def tick(self, max_errors: int) -> None:
        """Advance all ramps by one step and quarantine seeds with ``max_errors`` faulty steps."""
        ops.tick(self.arena, self.num_seeds, max_errors)

    def begin_snapshot(self) -> None:
        """Start copying the bank to the host; never waits."""
        if self._pending is None:
            self._pending = _PendingSnapshot.of(self.arena, self._writes)

    @property
    def snapshot_pending(self) -> bool:
        return self._pending is not None

    def take_snapshot(self) -> "Snapshot | None":
        """Return the snapshot once its copy has completed, else None; never waits."""
        pending = self._pending
        if pending is None or not pending.completed():
            return None
        self._pending = None
        snapshot = Snapshot(_typed_views(pending.copy, self.block.fields()), self.num_seeds)
        if self.arena is not self._host_arena and pending.writes == self._writes:
            host = _typed_views(self._host_arena, self.block.fields())
            for field in _DEVICE_FIELDS:
                host[field].copy_(snapshot.fields[field])
        return snapshot

    def move_to(self, device: torch.device) -> None:
        """Follow the model to another device; cells have to be refreshed. Waits for the copy."""
        if device == self.device:
            return
        if self.arena is not self._host_arena:
            self._host_arena.copy_(self.arena)
        self.device = device
        self.arena = self._host_arena if device.type == "cpu" else self._host_arena.to(device)
        self.fields = _typed_views(self.arena, self.block.fields())
        self._pending = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedBank":
        twin = SeedBank(self.num_seeds, self.device)
        memo[id(self)] = twin
        twin._host_arena.copy_(self._host_arena)
        if self.arena is not self._host_arena:
            twin.arena.copy_(self.arena)
        return twin


class SeedCell:
    """One seed's views into the bank, as ops take them: one-element tensors on the device."""

    __slots__ = ("alpha", "bank", "fault", "index", "non_finite")

    def __init__(self, bank: SeedBank, index: int):
        self.bank = bank
        self.index = index
        self.refresh()

    def refresh(self) -> None:
        """Take the views anew, after the bank has moved."""
        one = slice(self.index, self.index + 1)
        self.alpha = self.bank.fields["alpha_blend"][one]  # (1,) float32
        self.fault = self.bank.fields["fault"][one]  # (1,) uint8
        self.non_finite = self.bank.fields["health_accumulator"][4, one]  # (1,) float32

    def quarantine(self) -> None:
        """Take the seed out of the output for good, for an error that the host saw."""
        self.bank.write("error_count", self.index, self.bank.mirror["error_count"][self.index] + 1)
        self.bank.write("fallback_active", self.index, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedCell":
        # Views are made anew: copied ones would not belong to the copied bank's block.
        return SeedCell(copy.deepcopy(self.bank, memo), self.index)


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of all fields in host memory, taken between two steps."""

    fields: dict[str, Tensor]
    num_seeds: int


@dataclass(frozen=True)
class _PendingSnapshot:
    copy: Tensor
    writes: int
    event: "torch.cuda.Event | None"

    @classmethod
    def of(cls, arena: Tensor, writes: int) -> "_PendingSnapshot":
        if arena.device.type == "cpu":
            return cls(arena.clone(), writes, None)
        pinned = torch.empty(arena.shape, dtype=arena.dtype, pin_memory=True)
        pinned.copy_(arena, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(arena.device))
        return cls(pinned, writes, event)

    def completed(self) -> bool:
        return self.event is None or bool(self.event.query())


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = getattr(torch, dtype).itemsize
    for length in shape:
        size *= length
    return int(size)


def _typed_views(arena: Tensor, layout: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: arena[offset : offset + _nbytes(dtype, shape)].view(getattr(torch, dtype)).view(shape)
        for name, (offset, dtype, shape) in layout.items()
    }
