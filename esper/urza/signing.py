"""The evaluator's private key, with which its verdicts are signed."""

import os
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from esper.contracts import KernelStatement
from esper.errors import LibraryError
from esper.trust import TrustedKey
from esper.urza.folders import sync_directory


class EvaluatorKey:
    """An Ed25519 key. Whoever can read its file can declare any artifact VALIDATED."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def load_or_create(cls, path: Path) -> "EvaluatorKey":
        """Read the PEM file at ``path``; where there is none, make one that only its owner reads.

        Of several processes that create it at once one wins, and all of them use its key.
        """
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _publish(_new_pem(), path)
        return cls(_read(path))

    def sign(self, statement: KernelStatement) -> str:
        """Return the signature over the statement's canonical form, in hexadecimal."""
        return self._private.sign(statement.canonical()).hex()

    def trusted(self) -> TrustedKey:
        return TrustedKey(self._private.public_key().public_bytes_raw())


def _new_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def _publish(pem: bytes, path: Path) -> None:
    """Give ``path`` its bytes at once and for the first time only.

    A file opened with O_EXCL under its final name could be read, or left by a crash, half written;
    a link to a finished one is as exclusive. ``mkstemp`` creates it with mode 0600.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
        sync_directory(path.parent)
    except FileExistsError:
        pass  # another process was first: its key counts
    finally:
        Path(temporary).unlink()


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise LibraryError(f"evaluator key {path}: not an unencrypted PEM private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LibraryError(
            f"evaluator key {path}: expected an Ed25519 private key, got {type(key).__name__}"
        )
    return key
