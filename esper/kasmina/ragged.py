"""Samples of different lengths in one batch: kernels, which take one shape, see them padded by 0.

They come as nested tensors on the fast path of TransformerEncoder, and as PackedSequence from and
to recurrent layers. Jagged nested tensors are not among them: their lengths lie on the device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Batch = Tensor | PackedSequence


def as_batch(value: Any) -> Batch | None:
    """Return ``value`` if a kernel can be run on it, else None."""
    if isinstance(value, Tensor):
        return value if value.layout is not torch.jagged else None
    return value if isinstance(value, PackedSequence) else None


def rows(batch: Batch | None) -> Tensor | None:
    """Return what can be observed of a batch: a packed one's rows, (sum of lengths, C)."""
    return batch.data if isinstance(batch, PackedSequence) else batch


def padded(batch: Batch, batch_first: bool) -> Tensor:
    """Return a batch with one shape; packed samples stay in the order in which they are packed."""
    if isinstance(batch, PackedSequence):
        in_order = PackedSequence(batch.data, batch.batch_sizes)
        return pad_packed_sequence(in_order, batch_first)[0]
    return batch.to_padded_tensor(0.0) if batch.is_nested else batch


def unpadded(dense: Tensor, like: Batch, batch_first: bool) -> Batch:
    """Return ``dense`` with the lengths, and in the form, of ``like``."""
    if isinstance(like, PackedSequence):
        in_order = PackedSequence(like.data, like.batch_sizes)
        lengths = pad_packed_sequence(in_order, batch_first)[1]
        packed = pack_padded_sequence(dense, lengths, batch_first)
        return PackedSequence(packed.data, *like[1:])
    if not like.is_nested:
        return dense
    samples = zip(dense, like.unbind(), strict=True)
    return torch.nested.as_nested_tensor([row[: sample.shape[0]] for row, sample in samples])
