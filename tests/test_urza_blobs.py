"""The blob store: content-addressed, whole or absent, checked on every read."""

import resource
from pathlib import Path

import pytest
from urza_samples import UNKNOWN, digest

from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError
from esper.urza.blobs import BlobStore


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("data", [b"", b"\0", b"kernel" * 100_000])
def test_put_then_get_returns_the_bytes(blobs: BlobStore, data: bytes) -> None:
    assert blobs.put(data) == digest(data)
    assert blobs.get(digest(data)) == data


def test_layout_is_the_digest_below_its_first_two_digits(blobs: BlobStore, tmp_path: Path) -> None:
    name = blobs.put(b"kernel")
    assert files_below(tmp_path) == [tmp_path / "blobs" / name[:2] / name]


def test_put_is_idempotent(blobs: BlobStore, tmp_path: Path) -> None:
    name = blobs.put(b"kernel")
    before = files_below(tmp_path)[0].stat()
    assert blobs.put(b"kernel") == name
    after = files_below(tmp_path)[0].stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_altered_blob_is_refused_and_putting_it_again_heals_it(
    blobs: BlobStore, tmp_path: Path
) -> None:
    name = blobs.put(b"kernel")
    files_below(tmp_path)[0].write_bytes(b"kernal")
    with pytest.raises(
        ArtifactIntegrityError,
        match=f"^blob {name} was altered: its bytes have digest {digest(b'kernal')}$",
    ):
        blobs.get(name)
    blobs.put(b"kernel")
    assert blobs.get(name) == b"kernel"


def test_an_unknown_blob_is_not_found(blobs: BlobStore) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"^no blob {UNKNOWN} in .*blobs$"):
        blobs.get(UNKNOWN)


@pytest.mark.parametrize(
    "name", ["", "ab", "../../etc/passwd", "F" * 64, "f" * 64 + "\n", "f" * 62 + "/.", None, 7]
)
def test_a_name_that_is_no_digest_is_refused(blobs: BlobStore, name: str) -> None:
    with pytest.raises(ValueError, match=r"^an id is 64 lowercase hexadecimal digits, got "):
        blobs.get(name)


def test_a_failed_write_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            blobs.put(b"kernel" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert files_below(tmp_path) == []
