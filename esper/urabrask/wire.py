"""Frames between the evaluator and a candidate: JSON and safetensors, never pickle.

::

    nonce (16 bytes) | header length (u32) | body length (u64) | header | body

All numbers are little-endian. The header is a JSON object, the body a safetensors file. In an
answer the seal stands in place of the nonce: the first 16 bytes of the HMAC-SHA256 of the
question's nonce, header and body, under a key that the evaluator makes for each candidate. So
whatever else arrives on the channel is not an answer. Every length is checked before memory is
set aside for it.
"""

import hashlib
import hmac
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

NONCE_BYTES = 16
HEADER_LIMIT_BYTES = 2**20

_PREFIX = struct.Struct(f"<{NONCE_BYTES}sIQ")
PREFIX_BYTES = _PREFIX.size


class WireError(Exception):
    """Bytes that are not a frame, or not the frame that was asked for."""


class Prefix(NamedTuple):
    nonce: bytes
    header_bytes: int
    body_bytes: int

    @property
    def frame_bytes(self) -> int:
        return PREFIX_BYTES + self.header_bytes + self.body_bytes


class Frame(NamedTuple):
    nonce: bytes
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(nonce: bytes, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    head, body = _serialised(header, tensors)
    return b"".join((_PREFIX.pack(nonce, len(head), len(body)), head, body))


def seal(
    key: bytes, nonce: bytes, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> bytes:
    """Pack the answer to the question that had this nonce."""
    head, body = _serialised(header, tensors)
    prefix = _PREFIX.pack(_sealed(key, nonce, head, body), len(head), len(body))
    return b"".join((prefix, head, body))


def is_sealed(data: bytes | bytearray, key: bytes, nonce: bytes) -> bool:
    """Tell whether a whole frame is an answer to the question that had this nonce."""
    expected = _sealed(key, nonce, memoryview(data)[PREFIX_BYTES:])
    return hmac.compare_digest(bytes(data[:NONCE_BYTES]), expected)


def _sealed(key: bytes, nonce: bytes, *parts: bytes | memoryview) -> bytes:
    code = hmac.new(key, nonce, hashlib.sha256)
    for part in parts:
        code.update(part)
    return code.digest()[:NONCE_BYTES]


def _serialised(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    head = json.dumps(header).encode()
    # Copies, because safetensors refuses tensors that share memory, as a gradient may.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return head, safetensors.torch.save(copies)


def unpack_prefix(data: bytes | bytearray, body_limit_bytes: int) -> Prefix:
    """Read the first :data:`PREFIX_BYTES` of a frame, and refuse lengths beyond the limits."""
    prefix = Prefix(*_PREFIX.unpack_from(data))
    if prefix.header_bytes > HEADER_LIMIT_BYTES or prefix.body_bytes > body_limit_bytes:
        raise WireError(
            f"a frame with a header of {prefix.header_bytes} and a body of {prefix.body_bytes} "
            f"bytes, limits are {HEADER_LIMIT_BYTES} and {body_limit_bytes}"
        )
    return prefix


def unpack(data: bytes | bytearray, prefix: Prefix) -> Frame:
    """Take apart a whole frame; the tensors own their memory."""
    body_start = PREFIX_BYTES + prefix.header_bytes
    try:
        header = json.loads(data[PREFIX_BYTES:body_start])
        views = safetensors.torch.load(bytes(data[body_start : prefix.frame_bytes]))
    except (ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise WireError(f"a frame that cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise WireError(f"a frame whose header is a {type(header).__name__}, expected an object")
    return Frame(prefix.nonce, header, {name: view.clone() for name, view in views.items()})


def read_frame(read_exactly: Callable[[int], bytes], body_limit_bytes: int) -> Frame:
    """Block until a whole frame has come; ``read_exactly`` raises ``EOFError`` at the end."""
    head = read_exactly(PREFIX_BYTES)
    prefix = unpack_prefix(head, body_limit_bytes)
    return unpack(head + read_exactly(prefix.frame_bytes - PREFIX_BYTES), prefix)


def as_tensor(data: bytes) -> Tensor:
    """Return ``data`` as a uint8 tensor, the form in which a file travels in a frame."""
    if not data:  # which frombuffer refuses
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
