"""What a ``state_dict()`` says of a kernel in its place, beside weights: a seat's extra state.

It is one tensor of fixed size, so that it passes through ``torch.save`` with ``weights_only``,
safetensors and ``torch.distributed.checkpoint``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts import SeedState

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class SeatMark:
    """What a ``state_dict()`` says of one kernel in its place."""

    artifact_id: str
    state: SeedState
    alpha: float


def pack_mark(artifact_id: str, state: SeedState, alpha: Tensor) -> Tensor:
    """Return uint8 (37,): digest, state and the bytes of ``alpha`` ((1,) float32), on its device."""
    known = torch.tensor([*bytes.fromhex(artifact_id), state], dtype=torch.uint8)
    return torch.cat([known.to(alpha.device), alpha.view(torch.uint8)])


def unpack_mark(packed: Tensor) -> SeatMark:
    """Undo :func:`pack_mark`. Synchronises with the device."""
    known = packed.cpu()
    return SeatMark(
        bytes(known[:_DIGEST_BYTES].tolist()).hex(),
        SeedState(int(known[_DIGEST_BYTES])),
        float(known[_DIGEST_BYTES + 1 :].clone().view(torch.float32)),
    )
