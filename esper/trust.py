"""What a loader may trust: the evaluator's public key, and the checks between bytes and their use.

It stands below Kasmina in the import order so that the execution layer can check an artifact
without importing the library, and it holds no private key and no torch.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from esper.contracts import (
    KernelBundle,
    KernelManifest,
    KernelRecord,
    KernelStatement,
    KernelStatus,
)
from esper.errors import ArtifactIntegrityError, ArtifactNotValidatedError

# Flat names without a leading dot: a loader writes these files into a folder of its own.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class TrustedKey:
    """The public half of an evaluator's Ed25519 key."""

    public_bytes: bytes  # raw, 32 bytes

    def __post_init__(self) -> None:
        if len(self.public_bytes) != 32:
            raise ValueError(f"an Ed25519 public key has 32 bytes, got {len(self.public_bytes)}")

    @classmethod
    def from_hex(cls, text: str) -> "TrustedKey":
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise ValueError(f"not an Ed25519 public key in hexadecimal: {text!r}") from error

    @classmethod
    def from_pem(cls, pem: bytes) -> "TrustedKey":
        try:
            key = load_pem_public_key(pem)
        except ValueError as error:
            raise ValueError("not a public key in PEM form") from error
        if isinstance(key, Ed25519PublicKey):
            return cls(key.public_bytes_raw())
        raise ValueError(f"expected an Ed25519 public key, got {type(key).__name__}")

    def hex(self) -> str:
        return self.public_bytes.hex()

    def pem(self) -> bytes:
        key = Ed25519PublicKey.from_public_bytes(self.public_bytes)
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def verify(self, statement: KernelStatement, signature: str) -> None:
        """Raise ArtifactIntegrityError unless ``signature`` (hexadecimal) holds over it."""
        key = Ed25519PublicKey.from_public_bytes(self.public_bytes)
        try:
            key.verify(bytes.fromhex(signature), statement.canonical())
        except (InvalidSignature, ValueError) as error:
            raise ArtifactIntegrityError(
                f"kernel {statement.artifact_id}: the signature over its {statement.status} "
                f"statement does not hold for the trusted key {self.hex()}"
            ) from error


def verify_bundle(bundle: KernelBundle, trusted: TrustedKey) -> None:
    """Refuse a bundle unless the evaluator signed VALIDATED over the very bytes it carries.

    Raises ArtifactNotValidatedError or ArtifactIntegrityError. It does not ask whether the kernel
    fits a site; and since loading a kernel runs its code, call it before anything is parsed.
    """
    record = bundle.record
    if record.status is not KernelStatus.VALIDATED:
        raise ArtifactNotValidatedError(
            f"kernel {record.artifact_id} is {record.status}; only VALIDATED kernels may be loaded"
        )
    found = record.manifest.artifact_id
    if found != record.artifact_id:
        raise ArtifactIntegrityError(
            f"kernel {record.artifact_id}: its manifest is that of artifact {found}"
        )
    _verify_statement(record, trusted)
    verify_files(record.manifest, bundle.files)


def _verify_statement(record: KernelRecord, trusted: TrustedKey) -> None:
    statement, signature = record.statement, record.signature
    if statement is None or signature is None:
        raise ArtifactIntegrityError(f"kernel {record.artifact_id} carries no signed statement")
    if statement.artifact_id != record.artifact_id:
        raise ArtifactIntegrityError(
            f"kernel {record.artifact_id}: its statement is about kernel {statement.artifact_id}"
        )
    if statement.status is not KernelStatus.VALIDATED:
        raise ArtifactIntegrityError(
            f"kernel {record.artifact_id}: its record says VALIDATED, "
            f"its statement says {statement.status}"
        )
    trusted.verify(statement, signature)


def verify_files(manifest: KernelManifest, files: Mapping[str, bytes]) -> None:
    """Raise ArtifactIntegrityError unless ``files`` are exactly those that the manifest names."""
    artifact_id = manifest.artifact_id
    for name in sorted(manifest.files.keys() | files.keys()):
        if not _FILE_NAME.fullmatch(name):
            raise ArtifactIntegrityError(f"kernel {artifact_id}: file name {name!r} is not allowed")
    if missing := sorted(manifest.files.keys() - files.keys()):
        raise ArtifactIntegrityError(f"kernel {artifact_id}: files {missing} are missing")
    if extra := sorted(files.keys() - manifest.files.keys()):
        raise ArtifactIntegrityError(
            f"kernel {artifact_id}: files {extra} are not named by its manifest"
        )
    for name, expected in manifest.files.items():
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise ArtifactIntegrityError(
                f"kernel {artifact_id}: file {name!r} has digest {found}, expected {expected}"
            )
