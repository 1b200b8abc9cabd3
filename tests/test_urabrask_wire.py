"""Frames survive the way, and what is no frame is refused before memory is set aside for it."""

import io
import struct

import pytest
import torch

from esper.urabrask import wire

NONCE = bytes(range(wire.NONCE_BYTES))
LIMIT = 2**16


def read(data: bytes) -> wire.Frame:
    prefix = wire.unpack_prefix(data[: wire.PREFIX_BYTES], LIMIT)
    return wire.unpack(data, prefix)


def test_round_trip() -> None:
    tensors = {"x": torch.randn(3, 4).T, "n": torch.tensor(7), "none": torch.empty(0, 3)}
    frame = read(wire.pack(NONCE, {"do": "run"}, tensors))
    assert frame.nonce == NONCE
    assert frame.header == {"do": "run"}
    assert frame.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(frame.tensors[name], tensor)


@pytest.mark.parametrize("data", [b"", b"bytes of a file"])
def test_files_travel_as_tensors(data: bytes) -> None:
    assert wire.as_bytes(wire.as_tensor(data)) == data


def test_tensors_that_share_memory_arrive() -> None:
    x = torch.ones(2)
    assert read(wire.pack(NONCE, {}, {"x": x, "y": x})).tensors.keys() == {"x", "y"}


@pytest.mark.parametrize(("header_bytes", "body_bytes"), [(2**31, 0), (2, 2**60)])
def test_large_frames_are_refused_by_their_prefix(header_bytes: int, body_bytes: int) -> None:
    prefix = struct.pack("<16sIQ", NONCE, header_bytes, body_bytes)
    with pytest.raises(
        wire.WireError, match=f"header of {header_bytes} and a body of {body_bytes}"
    ):
        wire.unpack_prefix(prefix, LIMIT)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        (b"{}", b"no safetensors"),
        (b"{}", struct.pack("<Q", 2**62) + b"{}"),
    ],
)
def test_garbage_is_refused(header: bytes, body: bytes) -> None:
    data = struct.pack("<16sIQ", NONCE, len(header), len(body)) + header + body
    with pytest.raises(wire.WireError, match="a frame that cannot be read"):
        read(data)


def test_header_must_be_an_object() -> None:
    body = wire.pack(NONCE, {}, {})[wire.PREFIX_BYTES + 2 :]
    data = struct.pack("<16sIQ", NONCE, 2, len(body)) + b"[]" + body
    with pytest.raises(wire.WireError, match="header is a list, expected an object"):
        read(data)


def test_reading_a_stream() -> None:
    stream = io.BytesIO(wire.pack(NONCE, {"do": "run"}, {}))
    assert wire.read_frame(stream.read, LIMIT).header == {"do": "run"}


def test_an_answer_bears_the_seal_of_its_question() -> None:
    key, answer = b"k" * 32, wire.seal(b"k" * 32, NONCE, {"do": "run"}, {"x": torch.ones(2)})
    assert read(answer).header == {"do": "run"}
    assert wire.is_sealed(answer, key, NONCE)
    assert not wire.is_sealed(answer, b"another", NONCE)
    assert not wire.is_sealed(answer, key, bytes(16))
    assert not wire.is_sealed(answer[:-1] + b"\xff", key, NONCE)
