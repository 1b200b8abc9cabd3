"""Tensors with a no man's land around them, and fresh memory that holds nonsense.

What is written beyond a tensor stays in its no man's land and is found there; what is read from
there is NaN.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BAND_BYTES = 4096  # before and after
_FILL = 0xFF  # NaN in every floating dtype
_M_PERTURB = -6  # of mallopt(3): fresh memory is filled with the complement of this byte
_NONSENSE = 0x81


class Guarded:
    """Memory for one tensor; ``strided`` leaves a gap after each of its elements."""

    def __init__(self, like: Tensor, *, strided: bool) -> None:
        step = 2 if strided else 1
        self._step, self._itemsize = step, like.element_size()
        self._elements = like.numel() * step
        size = self._elements * self._itemsize + 2 * _BAND_BYTES
        self._bytes = torch.full((size,), _FILL, dtype=torch.uint8, device=like.device)
        self._shape, self._dtype = like.shape, like.dtype
        self._strides = tuple(stride * step for stride in _contiguous_strides(like.shape))

    def tensor(self) -> Tensor:
        """Return the tensor in the middle, of indefinite values; no view, as autograd sees it."""
        storage = self._bytes.untyped_storage()
        empty = torch.empty(0, dtype=self._dtype, device=self._bytes.device)
        return empty.set_(storage, _BAND_BYTES // self._itemsize, self._shape, self._strides)

    def fits(self, like: Tensor, *, strided: bool) -> bool:
        step = 2 if strided else 1
        return (self._shape, self._dtype, self._step) == (like.shape, like.dtype, step)

    def overrun(self) -> bool:
        """Whether anything but the tensor's own elements was written to."""
        inner = self._bytes[_BAND_BYTES : self._bytes.numel() - _BAND_BYTES]
        outer = (self._bytes[:_BAND_BYTES], self._bytes[self._bytes.numel() - _BAND_BYTES :])
        gaps = inner.view(self._elements // self._step, self._step, self._itemsize)[:, 1:]
        return not all(bool((part == _FILL).all()) for part in (*outer, gaps))


def guard(module: torch.nn.Module) -> dict[str, Guarded]:
    """Move parameters and buffers into guarded memory; return it by ``state.<name>``."""
    memories = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        memory = memories[f"state.{name}"] = Guarded(tensor, strided=False)
        moved = memory.tensor().copy_(tensor.detach())
        tensor.data = moved
    return memories


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with nonsense: PyTorch's own tensors with NaN, the C library's likewise."""
    ctypes.CDLL(None).mallopt(_M_PERTURB, _NONSENSE)
    # What torch.use_deterministic_algorithms calls, after it has imported Inductor for 2 s.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
        ctypes.CDLL(None).mallopt(_M_PERTURB, 0)
