"""Copies from a device to host memory that nobody waits for."""

from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A mark in a device's stream of work."""

    def query(self) -> bool:
        """Say whether all work before the mark has completed; never waits."""


class PendingCopy:
    """A copy from ``source`` to ``target`` (host memory, pinned for CUDA), begun on the current
    stream of the source's device. ``target`` must be left alone until it has completed."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)
        self._event = mark(source.device)

    def completed(self) -> bool:
        return self._event is None or self._event.query()


def mark(device: torch.device) -> Event | None:
    """Return a mark at the end of the current stream's work; None where work is done at once."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def host_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """Return uninitialised host memory that ``device`` can copy to and from without a wait."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory (pinned for CUDA), begun on the current stream.

    Copies back that are begun on the same stream come after it, so nobody need wait.
    """
    copied = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copied.copy_(tensor, non_blocking=True)
