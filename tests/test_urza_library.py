"""The library: what it takes and gives back, and what it refuses."""

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from urza_backends import LOCAL, Place, free_port, sqlite_place
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

from esper.contracts import BlueprintStatus, KernelStatus, Outcome, Pipeline, SeedEvaluation
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    LibraryError,
)
from esper.trust import verify_bundle
from esper.urza import Urza

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
PENDING, VALIDATED, REJECTED, _ = KernelStatus


def test_a_library_is_found_again(place: Place) -> None:
    with closing(place.open()) as urza:
        artifact_id = publish(urza)
        judge(urza, artifact_id)
        head, key = urza.audit.head(), urza.trusted_key
    with closing(place.open()) as urza:
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


def test_the_key_may_lie_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "library"
    with Urza(root, key_path=tmp_path / "secrets" / "key.pem") as urza:
        assert urza.evaluator_key.trusted() == urza.trusted_key
    assert (tmp_path / "secrets" / "key.pem").exists()
    assert not (root / "keys").exists()


@LOCAL
def test_the_environment_says_where_the_parts_lie(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URZA_URL", place.url)
    monkeypatch.setenv("URZA_BLOBS", place.blobs)
    monkeypatch.setenv("URZA_KEY", str(place.key_path))
    with Urza() as urza:
        artifact_id = publish(urza)
    assert not place.key_path.exists()  # who signs nothing makes no key
    with Urza() as urza:
        assert urza.fetch_kernel(artifact_id).files == kernel_files()
    with Urza(tmp_path / "folder") as urza:  # a folder goes before the environment
        assert urza.kernels() == []
    other = tmp_path / "other"
    with Urza(url=f"sqlite:///{other}/db", blobs=str(other)) as urza:  # and so does an argument
        assert urza.kernels() == []
    with Urza(tmp_path / "folder", url=place.url, blobs=place.blobs) as urza:
        assert urza.fetch_kernel(artifact_id).files == kernel_files()


@pytest.mark.parametrize("missing", ["URZA_URL", "URZA_BLOBS"])
def test_a_library_without_a_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    place = sqlite_place(tmp_path)
    parts = {"URZA_URL": place.url, "URZA_BLOBS": place.blobs}
    for name in parts.keys() - {missing}:
        monkeypatch.setenv(name, parts[name])
    with pytest.raises(ValueError, match=f"^a library without a folder needs {missing}$"):
        Urza()


@pytest.mark.parametrize(
    ("url", "because"),
    [
        ("no url", "^not the URL of a database: 'no url'$"),
        ("mysql://host/name", "^a library is kept in sqlite or postgresql, not in mysql$"),
        ("sqlite://", "^a library needs a file, got the database None$"),
        ("sqlite:///:memory:", "^a library needs a file, got the database ':memory:'$"),
    ],
)
def test_an_unfit_url_is_refused(tmp_path: Path, url: str, because: str) -> None:
    with pytest.raises(ValueError, match=because):
        Urza(tmp_path, url=url)


def test_an_unreachable_server_is_an_error_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://esper:secret@127.0.0.1:{free_port()}/none"
    with pytest.raises(LibraryError, match=r"^library postgresql.*onnection") as caught:
        Urza(tmp_path, url=url)
    assert "secret" not in str(caught.value)


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    root = tmp_path / "100% ours? #1 ünï"
    with Urza(root) as urza:
        publish(urza)
    with Urza(root) as urza:
        urza.verify()
    assert (root / "library.sqlite").exists()


def test_the_sqlite_database_is_durable_and_checks_foreign_keys(tmp_path: Path) -> None:
    with Urza(tmp_path) as urza, urza._database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "library.sqlite").write_bytes(b"something else entirely" * 100)
    with pytest.raises(LibraryError, match=r"library\.sqlite: file is not a database$"):
        Urza(tmp_path)


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
    urza: Urza, files: dict[str, bytes], because: str
) -> None:
    submit(urza)
    with pytest.raises(ArtifactIntegrityError, match=because):
        urza.publish_kernel(manifest(), files)
    assert urza.kernels() == []


def test_a_path_as_file_name_is_refused(urza: Urza) -> None:
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
        lambda urza, key: urza.archive(key),
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
            "archived": False,
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


def test_lineage_leads_on_to_recompilations_and_to_what_evolved(urza: Urza) -> None:
    first = publish(urza)
    again = publish(urza, pipeline=Pipeline.STANDARD)
    elsewhere = publish(urza, device="cuda")
    newest = publish(urza, torch_version="2.14")
    told = field_report(first)
    urza.record_field_report(told)
    evolved = blueprint("gated", parents=(blueprint().blueprint_id,))
    for _ in range(2):
        urza.submit_blueprint(evolved, graph("gated"), evolved_from=[told.digest(), told.digest()])
    edges = urza.lineage()["edges"]
    assert [edge for edge in edges if edge["kind"] not in ("compiled", "adapted")] == [
        {"source": blueprint().blueprint_id, "target": evolved.blueprint_id, "kind": "parent"},
        {"source": first, "target": again, "kind": "recompiled"},
        {"source": again, "target": newest, "kind": "recompiled"},
        {"source": told.digest(), "target": evolved.blueprint_id, "kind": "evolved"},
    ]
    assert elsewhere not in {edge["source"] for edge in edges}
    assert urza.audit.entries()[-1].details["evolved_from"] == [told.digest()]
    urza.verify()


def test_a_blueprint_that_evolved_from_nothing_known_is_refused(urza: Urza) -> None:
    with pytest.raises(
        ArtifactNotFoundError, match=f"^the library holds no field report {UNKNOWN}$"
    ):
        urza.submit_blueprint(blueprint(), graph("low_rank"), evolved_from=[UNKNOWN])
    with pytest.raises(ValueError, match=r"^an id is 64 lowercase hexadecimal digits, got "):
        urza.submit_blueprint(blueprint(), graph("low_rank"), evolved_from=["../x"])
    assert urza.blueprints() == []


@LOCAL
def test_nothing_that_a_lineage_names_can_be_deleted(urza: Urza) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id)
    urza.archive(artifact_id)
    for table in ("kernels", "blueprints", "tag_sets"):
        with (
            pytest.raises(LibraryError, match=r"(?i)foreign key constraint"),
            urza._database.write() as connection,
        ):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    assert urza.lineage()["nodes"][1]["archived"]
    urza.verify()


def test_an_empty_library_has_an_empty_lineage(urza: Urza) -> None:
    assert urza.lineage() == {"nodes": [], "edges": []}
