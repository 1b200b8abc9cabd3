"""The evaluator's key: made once, private from its first instant, and what it signs holds."""

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from urza_samples import UNKNOWN

from esper.contracts import KernelStatement, KernelStatus
from esper.errors import ArtifactIntegrityError, LibraryError
from esper.trust import TrustedKey
from esper.urza import EvaluatorKey

STATEMENT = KernelStatement(
    artifact_id=UNKNOWN, status=KernelStatus.VALIDATED, report_digest="0" * 64
)


@pytest.fixture
def key(tmp_path: Path) -> EvaluatorKey:
    return EvaluatorKey.load_or_create(tmp_path / "keys" / "evaluator.pem")


def test_a_signature_holds_for_its_statement(key: EvaluatorKey) -> None:
    key.trusted().verify(STATEMENT, key.sign(STATEMENT))


@pytest.mark.parametrize(
    "changed",
    [
        {"artifact_id": "e" * 64},
        {"status": KernelStatus.REJECTED},
        {"report_digest": "1" * 64},
    ],
)
def test_a_signature_holds_for_no_other_statement(
    key: EvaluatorKey, changed: dict[str, Any]
) -> None:
    other = STATEMENT.model_copy(update=changed)
    with pytest.raises(
        ArtifactIntegrityError,
        match=f"^kernel {other.artifact_id}: the signature over its {other.status} statement "
        f"does not hold for the trusted key {key.trusted().hex()}$",
    ):
        key.trusted().verify(other, key.sign(STATEMENT))


@pytest.mark.parametrize("signature", ["", "not hexadecimal", "00" * 64, "00" * 63])
def test_a_malformed_signature_does_not_hold(key: EvaluatorKey, signature: str) -> None:
    with pytest.raises(ArtifactIntegrityError, match=r"signature over its VALIDATED statement"):
        key.trusted().verify(STATEMENT, signature)


def test_a_foreign_key_is_not_trusted(key: EvaluatorKey, tmp_path: Path) -> None:
    foreign = EvaluatorKey.load_or_create(tmp_path / "foreign.pem")
    with pytest.raises(ArtifactIntegrityError, match=r"does not hold for the trusted key"):
        key.trusted().verify(STATEMENT, foreign.sign(STATEMENT))


def test_the_key_outlives_the_process(key: EvaluatorKey, tmp_path: Path) -> None:
    again = EvaluatorKey.load_or_create(tmp_path / "keys" / "evaluator.pem")
    assert again.trusted() == key.trusted()


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        EvaluatorKey.load_or_create(tmp_path / "keys" / "evaluator.pem")
    finally:
        os.umask(previous)
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["evaluator.pem"]
    assert stat.S_IMODE((tmp_path / "keys" / "evaluator.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_processes_that_create_the_key_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, keys = context.Barrier(4), context.SimpleQueue()
    children = [
        context.Process(target=create_key, args=(tmp_path / "evaluator.pem", barrier, keys))
        for _ in range(4)
    ]
    for child in children:
        child.start()
    found = {keys.get() for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["evaluator.pem"]


def create_key(path: Path, barrier: Any, keys: Any) -> None:
    barrier.wait(110)
    keys.put(EvaluatorKey.load_or_create(path).trusted().hex())


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_damaged_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluator.pem").write_bytes(content)
    with pytest.raises(LibraryError, match=r"evaluator\.pem: not an unencrypted PEM private key$"):
        EvaluatorKey.load_or_create(tmp_path / "evaluator.pem")


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    (tmp_path / "evaluator.pem").write_bytes(
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(LibraryError, match=r"expected an Ed25519 private key, got ECPrivateKey$"):
        EvaluatorKey.load_or_create(tmp_path / "evaluator.pem")
    pem = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ValueError, match=r"^expected an Ed25519 public key, got ECPublicKey$"):
        TrustedKey.from_pem(pem)


def test_a_trusted_key_is_read_from_hexadecimal_and_pem(key: EvaluatorKey) -> None:
    trusted = key.trusted()
    pem = Ed25519PublicKey.from_public_bytes(trusted.public_bytes).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    assert TrustedKey.from_hex(trusted.hex()) == trusted == TrustedKey.from_pem(pem)


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, "00" * 33])
def test_a_malformed_trusted_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not an Ed25519 public key in hexadecimal: "):
        TrustedKey.from_hex(text)
    with pytest.raises(ValueError, match=r"^not a public key in PEM form$"):
        TrustedKey.from_pem(text.encode())
    with pytest.raises(ValueError, match=r"^an Ed25519 public key has 32 bytes, got 3$"):
        TrustedKey(b"abc")
