"""The blob store: content-addressed, whole or absent, checked on every read."""

import resource
import uuid
from pathlib import Path

import fsspec
import pytest
from urza_backends import free_port
from urza_samples import UNKNOWN, digest

from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError, LibraryError
from esper.urza.blobs import BlobStore, FolderBlobs, open_blobs


@pytest.fixture(params=["folder", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    name = uuid.uuid4().hex
    if request.param == "folder":
        return open_blobs(str(tmp_path / "blobs"))
    if request.param == "memory":
        return open_blobs(f"memory://{name}")
    return open_blobs(f"{request.getfixturevalue('s3_bucket')}/{name}")


@pytest.fixture
def folder(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("data", [b"", b"\0", b"kernel" * 100_000])
def test_put_then_get_returns_the_bytes(blobs: BlobStore, data: bytes) -> None:
    assert blobs.put(data) == digest(data)
    assert blobs.get(digest(data)) == data


def test_layout_is_the_digest_below_its_first_two_digits(
    folder: FolderBlobs, tmp_path: Path
) -> None:
    name = folder.put(b"kernel")
    assert files_below(tmp_path) == [tmp_path / "blobs" / name[:2] / name]


def test_put_is_idempotent(blobs: BlobStore) -> None:
    name = blobs.put(b"kernel")
    assert blobs.put(b"kernel") == name
    assert blobs.get(name) == b"kernel"


def test_a_folder_does_not_write_what_it_holds(folder: FolderBlobs, tmp_path: Path) -> None:
    folder.put(b"kernel")
    before = files_below(tmp_path)[0].stat()
    folder.put(b"kernel")
    after = files_below(tmp_path)[0].stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_altered_blob_is_refused_and_putting_it_again_heals_it(blobs: BlobStore) -> None:
    name = blobs.put(b"kernel")
    blobs._write(digest(b"other"), b"kernal")
    with pytest.raises(
        ArtifactIntegrityError,
        match=f"^blob {digest(b'other')} was altered: its bytes have digest {digest(b'kernal')}$",
    ):
        blobs.get(digest(b"other"))
    blobs.put(b"other")
    assert blobs.get(digest(b"other")) == b"other"
    assert blobs.get(name) == b"kernel"


def test_an_unknown_blob_is_not_found(blobs: BlobStore) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"^no blob {UNKNOWN} in {blobs.name}$"):
        blobs.get(UNKNOWN)


@pytest.mark.parametrize(
    "name", ["", "ab", "../../etc/passwd", "F" * 64, "f" * 64 + "\n", "f" * 62 + "/.", None, 7]
)
def test_a_name_that_is_no_digest_is_refused(blobs: BlobStore, name: str) -> None:
    with pytest.raises(ValueError, match=r"^an id is 64 lowercase hexadecimal digits, got "):
        blobs.get(name)


def test_a_failed_write_leaves_nothing(folder: FolderBlobs, tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            folder.put(b"kernel" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert files_below(tmp_path) == []


def test_a_folder_s_url_is_a_folder(tmp_path: Path) -> None:
    name = open_blobs(f"file://{tmp_path}/blobs").put(b"kernel")
    assert FolderBlobs(tmp_path / "blobs").get(name) == b"kernel"


@pytest.mark.parametrize("url", ["s4://bucket", "nothing://at/all"])
def test_a_store_of_an_unknown_kind_is_refused(url: str) -> None:
    with pytest.raises(LibraryError, match=f"^blobs {url}: .*not known"):
        open_blobs(url)


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    blobs = open_blobs("s3://no-such-bucket/blobs")
    with pytest.raises(
        LibraryError, match=r"^blobs s3://no-such-bucket/blobs: .* was not stored: "
    ):
        blobs.put(b"kernel")


def test_a_server_that_is_away_is_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # they remember their server
    blobs = open_blobs(f"{s3_bucket}/away")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(LibraryError, match=f"^blobs {s3_bucket}/away: {UNKNOWN} was not read: "):
        blobs.get(UNKNOWN)
