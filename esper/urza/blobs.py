"""Immutable byte strings, each named by its SHA-256: ``ab/abcdef...`` in a folder or a bucket.

A blob appears whole or not at all, and its digest is checked whenever it is read.
"""

import hashlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError, LibraryError
from esper.urza.folders import made_folder, sync_directory

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDER_SCHEME = "file://"


def checked_digest(digest: str) -> str:
    """Return ``digest`` if it is a lowercase hexadecimal SHA-256, else raise ValueError.

    Digests become paths and keys, so nothing else may pass.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"an id is 64 lowercase hexadecimal digits, got {digest!r}")
    return digest


class BlobStore(ABC):
    """Content-addressed blobs, for any number of threads and processes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its digest; a damaged blob of that name is healed."""
        digest = hashlib.sha256(data).hexdigest()
        self._write(digest, data)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the blob after checking its bytes against ``digest``."""
        try:
            data = self._read(checked_digest(digest))
        except FileNotFoundError as error:
            raise ArtifactNotFoundError(f"no blob {digest} in {self.name}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise ArtifactIntegrityError(
                f"blob {digest} was altered: its bytes have digest {found}"
            )
        return data

    @abstractmethod
    def _write(self, digest: str, data: bytes) -> None: ...

    @abstractmethod
    def _read(self, digest: str) -> bytes:
        """Return what is stored by that name, unchecked; raise FileNotFoundError for nothing."""


class FolderBlobs(BlobStore):
    """Files below one folder. What a killed writer leaves lies in ``tmp``, which nobody reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._temporary = made_folder(folder / "tmp")
        sync_directory(folder.parent)

    def _write(self, digest: str, data: bytes) -> None:
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        if not _holds(path, digest):
            self._publish(path, data)
        # Also for a blob that was there: its writer may not have come as far as this.
        sync_directory(path.parent)
        sync_directory(self._folder)

    def _read(self, digest: str) -> bytes:
        return self._path(digest).read_bytes()

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

    def _publish(self, path: Path, data: bytes) -> None:
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


class ObjectBlobs(BlobStore):
    """Objects in a store that fsspec knows: ``s3://bucket/prefix``, ``memory://name``.

    Such a store makes an object visible when it has all of it. Credentials and the endpoint of an
    S3 server are the store's business: ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``. What the store
    has to complain of is raised as LibraryError.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        super().__init__(url)
        try:
            # A listing remembered here would not show what other processes have written.
            self._store, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise LibraryError(f"blobs {url}: {error}") from error

    def _write(self, digest: str, data: bytes) -> None:
        """Write even what is there: that costs one request, as looking would, and it heals."""
        try:
            self._store.pipe_file(self._key(digest), data)
        except Exception as error:
            raise LibraryError(f"blobs {self.name}: {digest} was not stored: {error}") from error

    def _read(self, digest: str) -> bytes:
        try:
            return bytes(self._store.cat_file(self._key(digest)))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise LibraryError(f"blobs {self.name}: {digest} was not read: {error}") from error

    def _key(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"


def open_blobs(place: str) -> BlobStore:
    """Return the store at a folder's path or ``file://`` URL, or at any other URL of fsspec's."""
    if "://" in place and not place.startswith(_FOLDER_SCHEME):
        return ObjectBlobs(place)
    return FolderBlobs(Path(place.removeprefix(_FOLDER_SCHEME)).absolute())


def _holds(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
