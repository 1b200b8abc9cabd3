"""A folder of immutable byte strings, each named by its SHA-256: ``blobs/ab/abcdef...``.

A blob appears whole or not at all. What a killed writer leaves behind is a file in
``blobs/tmp``, which nobody reads.
"""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def checked_digest(digest: str) -> str:
    """Return ``digest`` if it is a lowercase hexadecimal SHA-256, else raise ValueError.

    Digests become paths and keys, so nothing else may pass.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"an id is 64 lowercase hexadecimal digits, got {digest!r}")
    return digest


class BlobStore:
    """Content-addressed files below one folder, for any number of threads and processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its digest; a damaged blob of that name is healed."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        if not _holds(path, digest):
            self._write(path, data)
        # Also for a blob that was there: its writer may not have come as far as this.
        sync_directory(path.parent)
        sync_directory(self._folder)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the blob after checking its bytes against ``digest``."""
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise ArtifactNotFoundError(f"no blob {digest} in {self._folder}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise ArtifactIntegrityError(
                f"blob {digest} was altered: its bytes have digest {found}"
            )
        return data

    def _path(self, digest: str) -> Path:
        return self._folder / checked_digest(digest)[:2] / digest

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._temporary)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise


def _holds(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable; fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
