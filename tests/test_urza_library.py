"""The library: what it takes and gives back, and what it refuses."""

import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from urza_samples import (
    UNKNOWN,
    audited,
    blueprint,
    digest,
    field_report,
    graph,
    judge,
    kernel_files,
    manifest,
    publish,
    submit,
)

from esper.contracts import BlueprintStatus, KernelStatus, Outcome, SeedEvaluation
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    LibraryError,
)
from esper.trust import verify_bundle
from esper.urza import Urza

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
PENDING, VALIDATED, REJECTED = KernelStatus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "library"


@pytest.fixture
def urza(root: Path) -> Iterator[Urza]:
    with Urza(root) as library:
        yield library


def test_a_library_is_found_again(root: Path) -> None:
    with Urza(str(root)) as urza:
        artifact_id = publish(urza)
        judge(urza, artifact_id)
        head, key = urza.audit.head(), urza.trusted_key
    with Urza(root) as urza:
        assert urza.trusted_key == key
        assert urza.audit.head() == head
        verify_bundle(urza.fetch_kernel(artifact_id), key)
        urza.verify()


def test_a_file_is_no_library(tmp_path: Path) -> None:
    file = tmp_path / "a_file.py"
    file.touch()
    with pytest.raises(
        LibraryError, match=r"library .*a_file\.py: cannot be a folder: File exists"
    ):
        Urza(file)
    with pytest.raises(LibraryError, match="cannot be a folder: Not a directory"):
        Urza(file / "library")


def test_the_key_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    with Urza(root, key_path=tmp_path / "secrets" / "key.pem") as urza:
        assert urza.trusted_key == urza.evaluator_key.trusted()
    assert (tmp_path / "secrets" / "key.pem").exists()
    assert not (root / "keys").exists()


def test_the_database_is_durable_and_checks_foreign_keys(urza: Urza) -> None:
    with urza._database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_newer_schema_is_refused_and_left_alone(root: Path) -> None:
    Urza(root).close()
    with closing(sqlite3.connect(root / "library.sqlite")) as connection, connection:
        connection.execute("UPDATE schema_version SET version = 2")
    before = (root / "library.sqlite").read_bytes()
    with pytest.raises(
        LibraryError,
        match=r"library\.sqlite has schema version 2; this Esper reads versions up to 1$",
    ):
        Urza(root)
    assert (root / "library.sqlite").read_bytes() == before


def test_a_file_that_is_no_database_is_refused(root: Path) -> None:
    root.mkdir()
    (root / "library.sqlite").write_bytes(b"something else entirely" * 100)
    with pytest.raises(LibraryError, match=r"library\.sqlite: file is not a database$"):
        Urza(root)


def test_a_blueprint_is_kept(urza: Urza) -> None:
    blueprint_id = submit(urza)
    assert blueprint_id == blueprint().blueprint_id
    assert urza.blueprint(blueprint_id) == blueprint()
    assert urza.blueprint_status(blueprint_id) == (UNVALIDATED, "")
    assert urza.graph(blueprint_id) == graph("low_rank")
    assert audited(urza) == ["blueprint.submitted"]


def test_submitting_again_changes_nothing(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.set_blueprint_status(blueprint_id, COMPILING)
    head = urza.audit.head()
    assert submit(urza) == blueprint_id
    assert urza.blueprint_status(blueprint_id) == (COMPILING, "")
    assert urza.audit.head() == head


def test_a_graph_with_another_digest_is_refused(urza: Urza) -> None:
    with pytest.raises(
        ArtifactIntegrityError,
        match=f"^blueprint {blueprint().blueprint_id}: the graph has digest {digest(b'other')}, "
        f"expected {blueprint().graph_digest}$",
    ):
        urza.submit_blueprint(blueprint(), b"other")
    assert urza.blueprints() == []


def test_a_blueprint_of_unknown_parents_is_refused(urza: Urza) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"^the library holds no blueprint {UNKNOWN}$"):
        urza.submit_blueprint(blueprint(parents=(UNKNOWN,)), graph("low_rank"))
    assert urza.blueprints() == []


def test_blueprints_are_listed_oldest_first(urza: Urza) -> None:
    ids = [submit(urza, name) for name in ("c", "a", "b")]
    assert urza.blueprints() == ids
    urza.set_blueprint_status(ids[1], COMPILING)
    assert urza.blueprints(UNVALIDATED) == [ids[0], ids[2]]
    assert urza.blueprints(COMPILING) == [ids[1]]


LEGAL = {
    (UNVALIDATED, COMPILING),
    (COMPILING, COMPILED),
    (COMPILING, INVALID),
    (COMPILING, UNVALIDATED),
    (COMPILED, COMPILING),
}
PATH_TO = {
    UNVALIDATED: [],
    COMPILING: [COMPILING],
    COMPILED: [COMPILING, COMPILED],
    INVALID: [COMPILING, INVALID],
}


@pytest.mark.parametrize("source", BlueprintStatus)
@pytest.mark.parametrize("target", BlueprintStatus)
def test_every_status_change_is_legal_or_refused(
    urza: Urza, source: BlueprintStatus, target: BlueprintStatus
) -> None:
    blueprint_id = submit(urza)
    for status in PATH_TO[source]:
        urza.set_blueprint_status(blueprint_id, status, "on the way")
    head, before = urza.audit.head(), urza.blueprint_status(blueprint_id)
    if (source, target) in LEGAL:
        urza.set_blueprint_status(blueprint_id, target, "ran out of memory")
        assert urza.blueprint_status(blueprint_id) == (target, "ran out of memory")
        assert urza.audit.entries()[-1].details == {
            "source": source,
            "target": target,
            "log": "ran out of memory",
        }
    else:
        with pytest.raises(
            LibraryError, match=f"^blueprint {blueprint_id} is {source}; it cannot become {target}$"
        ):
            urza.set_blueprint_status(blueprint_id, target)
        assert (urza.audit.head(), urza.blueprint_status(blueprint_id)) == (head, before)


def test_a_kernel_is_kept(urza: Urza) -> None:
    artifact_id = publish(urza)
    record = urza.kernel(artifact_id)
    assert artifact_id == manifest().artifact_id == record.artifact_id
    assert (record.manifest, record.status) == (manifest(), PENDING)
    assert (record.statement, record.signature, record.tags) == (None, None, ())
    assert urza.fetch_kernel(artifact_id).files == kernel_files()
    assert urza.fetch_kernel(artifact_id).record == record
    assert audited(urza) == ["blueprint.submitted", "kernel.published"]


def test_publishing_again_changes_nothing(urza: Urza) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id)
    head, record = urza.audit.head(), urza.kernel(artifact_id)
    assert publish(urza) == artifact_id
    assert (urza.audit.head(), urza.kernel(artifact_id)) == (head, record)


def test_kernels_are_listed_oldest_first(urza: Urza) -> None:
    ids = [publish(urza, name) for name in ("c", "a", "b")]
    judge(urza, ids[2])
    assert [record.artifact_id for record in urza.kernels()] == ids
    assert [record.artifact_id for record in urza.kernels(PENDING)] == ids[:2]
    assert [record.artifact_id for record in urza.kernels(VALIDATED)] == ids[2:]


def test_a_kernel_of_an_unknown_blueprint_is_refused(urza: Urza) -> None:
    with pytest.raises(
        ArtifactNotFoundError, match=f"^the library holds no blueprint {manifest().blueprint_id}$"
    ):
        urza.publish_kernel(manifest(), kernel_files())
    assert urza.kernels() == []


@pytest.mark.parametrize(
    ("files", "because"),
    [
        ({"graph.json": graph("low_rank")}, r"files \['params.safetensors'\] are missing$"),
        (kernel_files() | {"x.so": b""}, r"files \['x.so'\] are not named by its manifest$"),
        (kernel_files() | {"graph.json": b""}, "file 'graph.json' has digest "),
    ],
)
def test_files_that_are_not_the_manifest_s_are_refused(
    urza: Urza, root: Path, files: dict[str, bytes], because: str
) -> None:
    submit(urza)
    with pytest.raises(ArtifactIntegrityError, match=because):
        urza.publish_kernel(manifest(), files)
    assert urza.kernels() == []


def test_a_path_as_file_name_is_refused(urza: Urza, root: Path) -> None:
    submit(urza)
    with pytest.raises(ArtifactIntegrityError, match=r"file name '../../evil' is not allowed$"):
        urza.publish_kernel(manifest(files={"../../evil": digest(b"")}), {"../../evil": b""})
    assert urza.kernels() == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda urza, key: urza.blueprint(key),
        lambda urza, key: urza.blueprint_status(key),
        lambda urza, key: urza.graph(key),
        lambda urza, key: urza.set_blueprint_status(key, COMPILING),
        lambda urza, key: urza.kernel(key),
        lambda urza, key: urza.fetch_kernel(key),
        lambda urza, key: urza.report(key),
    ],
)
def test_bad_ids_are_refused(urza: Urza, ask: Callable[[Urza, str], object]) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"the library holds no .* {UNKNOWN}$"):
        ask(urza, UNKNOWN)
    for key in ("", "../keys/evaluator.pem", UNKNOWN.upper(), UNKNOWN + "\n", "' OR 1=1 --"):
        with pytest.raises(ValueError, match=r"^an id is 64 lowercase hexadecimal digits, got "):
            ask(urza, key)


def test_field_reports_are_kept_once_and_in_order(urza: Urza) -> None:
    artifact_id = publish(urza)
    first = field_report(artifact_id)
    second = field_report(artifact_id, outcome=Outcome.CULLED)
    for told in (first, second, first):
        urza.record_field_report(told)
    assert urza.field_reports() == [first, second]
    assert audited(urza)[2:] == ["adaptation.reported"] * 2


def test_a_diverged_adaptation_can_be_reported(urza: Urza) -> None:
    evaluation = SeedEvaluation(
        seed_id=("blocks.2.mlp", 0),
        loss_with=math.nan,
        loss_without=1.5,
        contribution=-math.inf,
        standard_error=math.inf,
        num_samples=64,
    )
    told = field_report(publish(urza), outcome=Outcome.FAILED, evaluation=evaluation)
    urza.record_field_report(told)
    (kept,) = urza.field_reports()
    assert kept.canonical() == told.canonical()  # NaN is not equal to itself
    json.dumps(urza.lineage(), allow_nan=False)
    urza.verify()


def test_a_field_report_on_something_unknown_is_refused(urza: Urza) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"^the library holds no kernel {UNKNOWN}$"):
        urza.record_field_report(field_report(UNKNOWN))
    artifact_id = publish(urza)
    with pytest.raises(ArtifactNotFoundError, match=f"^the library holds no blueprint {UNKNOWN}$"):
        urza.record_field_report(field_report(artifact_id, blueprint_id=UNKNOWN))
    assert urza.field_reports() == []


def test_lineage_leads_from_parents_to_adaptations(urza: Urza) -> None:
    parent = submit(urza)
    made_from = blueprint("gated", parents=(parent,))
    child = urza.submit_blueprint(made_from, graph("gated"))
    kernel = urza.publish_kernel(manifest("gated", blueprint_id=child), kernel_files("gated"))
    judge(urza, kernel)
    told = field_report(kernel, blueprint_id=child)
    urza.record_field_report(told)
    lineage = json.loads(json.dumps(urza.lineage()))
    assert lineage["nodes"] == [
        {
            "id": parent,
            "kind": "blueprint",
            "design": "low_rank",
            "hparams": {"rank": 2},
            "status": "UNVALIDATED",
            "parents": [],
        },
        {
            "id": child,
            "kind": "blueprint",
            "design": "gated",
            "hparams": {"rank": 2},
            "status": "UNVALIDATED",
            "parents": [parent],
        },
        {
            "id": kernel,
            "kind": "kernel",
            "pipeline": "FAST",
            "status": "VALIDATED",
            "files": {name: digest(data) for name, data in kernel_files("gated").items()},
            "tags": ["small"],
        },
        {
            "id": told.digest(),
            "kind": "adaptation",
            "field_report": json.loads(told.model_dump_json()),
        },
    ]
    assert lineage["edges"] == [
        {"source": parent, "target": child, "kind": "parent"},
        {"source": child, "target": kernel, "kind": "compiled"},
        {"source": kernel, "target": told.digest(), "kind": "adapted"},
    ]


def test_an_empty_library_has_an_empty_lineage(urza: Urza) -> None:
    assert urza.lineage() == {"nodes": [], "edges": []}
