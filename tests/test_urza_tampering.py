"""Tampering with the files of a library: it notices, and hands out nothing that was altered."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from urza_samples import (
    SITE,
    UNKNOWN,
    blueprint,
    digest,
    field_report,
    graph,
    judge,
    kernel_files,
    manifest,
    publish,
    report,
)

from esper.contracts import BlueprintStatus, KernelQuery, KernelStatus
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    AuditError,
    LibraryError,
)
from esper.trust import verify_bundle
from esper.urza import Urza

PENDING, VALIDATED, REJECTED = KernelStatus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "library"


@pytest.fixture
def urza(root: Path) -> Iterator[Urza]:
    with Urza(root) as library:
        yield library


def execute(root: Path, statement: str, *values: object) -> None:
    """Change the database behind the library's back."""
    connection = sqlite3.connect(root / "library.sqlite")
    with connection:
        for verb in ("UPDATE", "DELETE"):
            connection.execute(f"DROP TRIGGER IF EXISTS audit_log_refuses_{verb}")
        connection.execute(statement, values)
    connection.close()


def blob_path(root: Path, name: str) -> Path:
    return root / "blobs" / name[:2] / name


@pytest.fixture
def full(urza: Urza) -> Urza:
    """A library with one of everything, which verifies."""
    artifact_id = publish(urza)
    urza.set_blueprint_status(blueprint().blueprint_id, BlueprintStatus.COMPILING, "pass 1")
    judge(urza, artifact_id)
    urza.record_field_report(field_report(artifact_id))
    urza.verify()
    return urza


@pytest.mark.parametrize(
    "name",
    [
        digest(graph("low_rank")),
        digest(kernel_files()["params.safetensors"]),
        report(manifest().artifact_id).digest(),
    ],
)
def test_an_altered_or_lost_blob_is_noticed(full: Urza, root: Path, name: str) -> None:
    blob_path(root, name).write_bytes(b"altered")
    with pytest.raises(ArtifactIntegrityError, match=f"^blob {name} was altered"):
        full.verify()
    blob_path(root, name).unlink()
    with pytest.raises(ArtifactNotFoundError, match=f"^no blob {name} in "):
        full.verify()


def test_an_altered_blob_is_not_handed_out(full: Urza, root: Path) -> None:
    for name in (digest(graph("low_rank")), report(manifest().artifact_id).digest()):
        blob_path(root, name).write_bytes(b"altered")
    for read in (
        lambda: full.graph(blueprint().blueprint_id),
        lambda: full.fetch_kernel(manifest().artifact_id),
        lambda: full.report(manifest().artifact_id),
    ):
        with pytest.raises(ArtifactIntegrityError, match=r"was altered: its bytes have digest"):
            read()


ROW_CHANGES = [
    ("blueprints", "contract", blueprint(dtype="float16").canonical().decode(), "was altered"),
    ("blueprints", "contract", "{}", "cannot be read"),
    ("blueprints", "status", "COMPILED", "status of row 1 is 'COMPILED', but must be 'COMPILING'"),
    ("blueprints", "log", "fine", "log of row 1 is 'fine', but must be 'pass 1'"),
    ("kernels", "manifest", manifest(device="cuda").canonical().decode(), "was altered"),
    ("kernels", "manifest", "", "cannot be read"),
    ("kernels", "status", "PROVEN", "cannot be read"),
    ("kernels", "tags", "fast", "cannot be read"),
    ("kernels", "report_digest", "x", "cannot be read"),
    ("kernels", "dtype", "float16", "dtype of row 1 is 'float16', but must be 'float32'"),
    ("kernels", "status", "REJECTED", "status of row 1 is 'REJECTED', but"),
    ("kernels", "tags", "[]", "tags of row 1 is"),
    ("kernels", "risk_score", 0.0, "risk_score of row 1 is 0.0, but must be 0.25"),
    ("reports", "signature", "00" * 64, "the signature over its VALIDATED statement"),
    ("reports", "status", "REJECTED", "status of row 1 is 'REJECTED', but"),
    ("field_reports", "contract", field_report(UNKNOWN).canonical().decode(), "was altered"),
]


@pytest.mark.parametrize(("table", "column", "value", "because"), ROW_CHANGES)
def test_an_altered_row_is_noticed(
    full: Urza, root: Path, table: str, column: str, value: object, because: str
) -> None:
    execute(root, f"UPDATE {table} SET {column} = ?", value)
    with pytest.raises(ArtifactIntegrityError, match=because):
        full.verify()


def test_an_altered_row_is_not_handed_out(full: Urza, root: Path) -> None:
    execute(root, "UPDATE kernels SET manifest = ?", manifest(device="cuda").canonical().decode())
    query = KernelQuery(site=SITE, dtype="float32", device="cpu")
    for read in (
        lambda: full.kernel(manifest().artifact_id),
        full.kernels,
        lambda: full.fetch_kernel(manifest().artifact_id),
        lambda: full.query(query),
        full.lineage,
    ):
        with pytest.raises(ArtifactIntegrityError, match=r"its row was altered, the content has"):
            read()


def test_an_unreadable_blueprint_status_is_not_handed_out(full: Urza, root: Path) -> None:
    execute(root, "UPDATE blueprints SET status = 'FORGED'")
    with pytest.raises(ArtifactIntegrityError, match=r"its row cannot be read: 'FORGED' is not a"):
        full.blueprint_status(blueprint().blueprint_id)


def test_a_rejected_row_relabelled_as_validated_does_not_load(urza: Urza, root: Path) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id, status=REJECTED)
    execute(root, "UPDATE kernels SET status = 'VALIDATED'")
    with pytest.raises(ArtifactIntegrityError, match=r"does not hold for the trusted key"):
        verify_bundle(urza.fetch_kernel(artifact_id), urza.trusted_key)
    with pytest.raises(ArtifactIntegrityError, match=r"status of row 1 is 'VALIDATED', but"):
        urza.verify()


@pytest.mark.parametrize("table", ["field_reports", "reports"])
def test_a_removed_row_is_noticed(full: Urza, root: Path, table: str) -> None:
    execute(root, f"DELETE FROM {table}")
    with pytest.raises(LibraryError, match=f"^{table} holds 0 rows, the audit log 1 '"):
        full.verify()


def test_a_row_slipped_in_is_noticed(full: Urza, root: Path) -> None:
    other = blueprint(dtype="float16")
    execute(
        root,
        "INSERT INTO blueprints (blueprint_id, contract, status, log) VALUES (?, ?, ?, '')",
        other.blueprint_id,
        other.canonical().decode(),
        "UNVALIDATED",
    )
    with pytest.raises(LibraryError, match=r"^blueprints holds 2 rows, the audit log 1 'blueprint"):
        full.verify()


def test_an_altered_audit_log_is_noticed(full: Urza, root: Path) -> None:
    execute(root, "UPDATE audit_log SET actor = 'nobody' WHERE seq = 2")
    with pytest.raises(AuditError, match=r"^audit log: row 2 was edited"):
        full.verify()
