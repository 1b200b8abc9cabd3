"""Tampering with the files of a library: it notices, and hands out nothing that was altered."""

import pytest
from urza_backends import Place
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

PENDING, VALIDATED, REJECTED, _ = KernelStatus


@pytest.fixture
def full(urza: Urza) -> Urza:
    """A library with one of everything, and a second blueprint, which verifies."""
    artifact_id = publish(urza)
    urza.set_blueprint_status(blueprint().blueprint_id, BlueprintStatus.COMPILING, "pass 1")
    judge(urza, artifact_id)
    told = field_report(artifact_id)
    urza.record_field_report(told)
    evolved = blueprint("gated")
    urza.submit_blueprint(evolved, graph("gated"), evolved_from=[told.digest()])
    urza.set_interest(evolved.blueprint_id, "tamiyo", 0.5)
    urza.claim_blueprint("forge", 60, blueprint_id=evolved.blueprint_id)
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
def test_an_altered_or_lost_blob_is_noticed(full: Urza, place: Place, name: str) -> None:
    place.write_blob(name, b"altered")
    with pytest.raises(ArtifactIntegrityError, match=f"^blob {name} was altered"):
        full.verify()
    place.remove_blob(name)
    with pytest.raises(ArtifactNotFoundError, match=f"^no blob {name} in "):
        full.verify()


def test_an_altered_blob_is_not_handed_out(full: Urza, place: Place) -> None:
    for name in (digest(graph("low_rank")), report(manifest().artifact_id).digest()):
        place.write_blob(name, b"altered")
    for read in (
        lambda: full.graph(blueprint().blueprint_id),
        lambda: full.fetch_kernel(manifest().artifact_id),
        lambda: full.report(manifest().artifact_id),
    ):
        with pytest.raises(ArtifactIntegrityError, match=r"was altered: its bytes have digest"):
            read()


ROW_CHANGES = [
    ("blueprints", "contract", blueprint(dtype="float16").canonical().decode(), "was altered"),
    ("blueprints", "blueprint_id", UNKNOWN, "was altered"),
    ("blueprints", "contract", "{}", "cannot be read"),
    ("blueprints", "status", "COMPILED", "status of row 1 is 'COMPILED', but must be 'COMPILING'"),
    ("blueprints", "log", "fine", "log of row 1 is 'fine', but must be 'pass 1'"),
    ("blueprints", "tamiyo_interest", 7.0, r"tamiyo_interest of row \d is 7.0, but must be 0"),
    ("blueprints", "urabrask_interest", 7.0, "urabrask_interest of row 1 is 7.0, but must be 0.0"),
    ("blueprints", "lease_owner", "thief", "lease_owner of row 1 is 'thief', but must be None"),
    ("kernels", "tag_set", None, r"is found by tags \[\], but has \['small'\]"),
    ("tag_set_members", "tag", "large", r"is found by tags \['large'\], but has \['small'\]"),
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
    full: Urza, place: Place, table: str, column: str, value: object, because: str
) -> None:
    where = "WHERE position = 1" if table == "blueprints" else ""
    place.execute(f"UPDATE {table} SET {column} = :value {where}", value=value)
    with pytest.raises(ArtifactIntegrityError, match=because):
        full.verify()


def test_an_altered_row_is_not_handed_out(full: Urza, place: Place) -> None:
    altered = manifest(device="cuda").canonical().decode()
    place.execute("UPDATE kernels SET manifest = :altered", altered=altered)
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


def test_an_unreadable_blueprint_status_is_not_handed_out(full: Urza, place: Place) -> None:
    place.execute("UPDATE blueprints SET status = 'FORGED'")
    with pytest.raises(ArtifactIntegrityError, match=r"(?s)its row cannot be read: .*FORGED"):
        full.blueprint_status(blueprint().blueprint_id)


def test_a_rejected_row_relabelled_as_validated_does_not_load(urza: Urza, place: Place) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id, status=REJECTED)
    place.execute("UPDATE kernels SET status = 'VALIDATED'")
    with pytest.raises(ArtifactIntegrityError, match=r"does not hold for the trusted key"):
        verify_bundle(urza.fetch_kernel(artifact_id), urza.trusted_key)
    with pytest.raises(ArtifactIntegrityError, match=r"status of row 1 is 'VALIDATED', but"):
        urza.verify()


@pytest.mark.parametrize("table", ["field_reports", "reports"])
def test_a_removed_row_is_noticed(full: Urza, place: Place, table: str) -> None:
    place.execute(f"DELETE FROM {table}")
    with pytest.raises(LibraryError, match=f"^{table} holds 0 rows, the audit log 1 '"):
        full.verify()


def test_a_row_slipped_in_is_noticed(full: Urza, place: Place) -> None:
    other = blueprint(dtype="float16")
    place.execute(
        "INSERT INTO blueprints (blueprint_id, contract, status, log) "
        "VALUES (:id, :contract, 'UNVALIDATED', '')",
        id=other.blueprint_id,
        contract=other.canonical().decode(),
    )
    with pytest.raises(LibraryError, match=r"^blueprints holds 3 rows, the audit log 2 'blueprint"):
        full.verify()


def test_an_altered_audit_log_is_noticed(full: Urza, place: Place) -> None:
    place.execute("UPDATE audit_log SET actor = 'nobody' WHERE seq = 2")
    with pytest.raises(AuditError, match=r"^audit log: row 2 was edited"):
        full.verify()


def test_a_removed_evolution_is_noticed(full: Urza, place: Place) -> None:
    place.execute("DELETE FROM evolutions")
    with pytest.raises(LibraryError, match=r"^evolutions holds 0 rows, the audit log 1; they"):
        full.verify()


def test_a_kernel_archived_behind_the_library_s_back_is_noticed(full: Urza, place: Place) -> None:
    place.execute("UPDATE kernels SET archived = true")
    with pytest.raises(LibraryError, match=r"^kernels holds 1 rows, the audit log 0 'kernel.arch"):
        full.verify()


def test_swapped_blobs_are_noticed(full: Urza, place: Place) -> None:
    first, second = digest(graph("low_rank")), digest(kernel_files()["params.safetensors"])
    place.write_blob(first, kernel_files()["params.safetensors"])
    place.write_blob(second, graph("low_rank"))
    with pytest.raises(
        ArtifactIntegrityError, match=f"was altered: its bytes have digest ({first}|{second})"
    ):
        full.fetch_kernel(manifest().artifact_id)


def test_a_truncated_blob_is_noticed_and_healed_by_publishing(full: Urza, place: Place) -> None:
    name = digest(kernel_files()["params.safetensors"])
    place.write_blob(name, kernel_files()["params.safetensors"][:-1])
    with pytest.raises(ArtifactIntegrityError, match=f"^blob {name} was altered"):
        full.fetch_kernel(manifest().artifact_id)
    publish(full)
    assert full.fetch_kernel(manifest().artifact_id).files == kernel_files()
