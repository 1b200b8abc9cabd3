"""Schemas: older libraries are migrated, with all that is in them, and newer ones refused."""

import multiprocessing
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from urza_backends import LOCAL, Place
from urza_first_library import make_first_library
from urza_samples import SITE, blueprint, manifest, submit

import esper.urza.migrations
from esper.contracts import BlueprintStatus, KernelQuery, Pipeline
from esper.errors import LibraryError
from esper.urza import Urza
from esper.urza.schema import REVISION, metadata


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A library of the first schema."""
    make_first_library(tmp_path / "library")
    return tmp_path / "library"


def description(urza: Urza) -> dict[str, Any]:
    """What the database says of its tables, apart from the order and the wording of it."""
    with urza._database.read() as connection:
        inspector = inspect(connection)
        tables = {
            name: {
                "columns": {
                    column["name"]: (str(column["type"]), column["nullable"], column["default"])
                    for column in inspector.get_columns(name)
                },
                "primary key": inspector.get_pk_constraint(name)["constrained_columns"],
                "foreign keys": sorted(
                    (*key["constrained_columns"], key["referred_table"], *key["referred_columns"])
                    for key in inspector.get_foreign_keys(name)
                ),
                "indexes": {
                    index["name"]: (index["column_names"], index["unique"])
                    for index in inspector.get_indexes(name)
                },
                "options": inspector.get_table_options(name),
            }
            for name in inspector.get_table_names()
        }
        triggers = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
        )
        return {"tables": tables, "triggers": triggers.all()}


def test_an_older_library_is_migrated_with_all_that_is_in_it(first: Path) -> None:
    with Urza(first) as urza:
        urza.verify()
        assert len(urza.audit.entries()) == 11
        artifact_id = manifest().artifact_id
        query = KernelQuery(
            site=SITE, dtype="float32", device="cpu", required_tags=frozenset({"small", "fast"})
        )
        assert urza.query(query) == [urza.kernel(artifact_id)]
        assert urza.kernel(artifact_id).tags == ("fast", "small")
        assert not urza.kernel(artifact_id).archived
        record = urza.blueprint_record(blueprint("gated").blueprint_id)
        assert (record.status, record.log) == (BlueprintStatus.COMPILING, "pass 1")
        assert (record.tamiyo_interest, record.lease_owner) == (0.0, None)
        assert urza.was_tried(blueprint().blueprint_id, Pipeline.FAST, "cpu", "2.13")
        assert urza.claim_blueprint("forge", 60) == record.blueprint_id
        submit(urza, "new")
        urza.verify()
    with Urza(first) as urza:
        assert len(urza.blueprints()) == 4


def test_a_migrated_library_has_the_schema_of_a_new_one(first: Path, tmp_path: Path) -> None:
    with Urza(first) as migrated, Urza(tmp_path / "new") as new:
        assert description(migrated) == description(new)


@LOCAL
def test_a_new_library_has_the_schema_that_the_code_says(urza: Urza) -> None:
    with urza._database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_newest_revision_is_the_one_that_the_code_says() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(esper.urza.migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


def test_the_first_esper_refuses_a_newer_library(first: Path) -> None:
    """It looks for this number and takes 1."""
    Urza(first).close()
    with closing(sqlite3.connect(first / "library.sqlite")) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(2,)]


@LOCAL
def test_a_newer_schema_is_refused_and_left_alone(place: Place) -> None:
    with closing(place.open()) as urza:
        submit(urza)
    place.execute("UPDATE alembic_version SET version_num = '0004'")
    with pytest.raises(
        LibraryError,
        match=r"^library .* has schema revision 0004; this Esper reads revisions up to 0003$",
    ):
        place.open()
    place.execute("UPDATE alembic_version SET version_num = :revision", revision=REVISION)
    with closing(place.open()) as urza:
        urza.verify()


def test_a_library_that_cannot_be_migrated_is_left_as_it_was(first: Path) -> None:
    with closing(sqlite3.connect(first / "library.sqlite")) as connection, connection:
        connection.execute("UPDATE kernels SET tags = 'fast' WHERE position = 1")
        before = list(connection.iterdump())
    with pytest.raises(
        LibraryError,
        match=r"library\.sqlite cannot be migrated from schema revision 0001: Expecting value",
    ):
        Urza(first)
    with closing(sqlite3.connect(first / "library.sqlite")) as connection:
        assert list(connection.iterdump()) == before


def test_an_up_to_date_library_opens_without_alembic(tmp_path: Path) -> None:
    program = (
        "import sys; from esper.urza import Urza; Urza(sys.argv[1]).close(); "
        "sys.exit('alembic' in sys.modules)"
    )
    for _ in ("made", "opened"):
        subprocess.run([sys.executable, "-c", program, tmp_path / "library"], check=True)


def open_and_submit(root: Path, writer: int, barrier: Any) -> None:
    barrier.wait(110)
    with Urza(root) as urza:
        submit(urza, f"process{writer}")


@pytest.mark.timeout(120)
def test_processes_that_migrate_at_once(first: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    children = [
        context.Process(target=open_and_submit, args=(first, writer, barrier))
        for writer in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    with Urza(first) as urza:
        urza.verify()
        assert len(urza.blueprints()) == 3 + 4


def test_a_backup_of_a_library_is_a_library(first: Path, tmp_path: Path) -> None:
    with Urza(first) as urza:
        head = urza.audit.head()
    shutil.copytree(first, tmp_path / "backup")
    with Urza(tmp_path / "backup") as urza:
        urza.verify()
        assert urza.audit.head() == head


@LOCAL
def test_a_place_without_a_library_is_left_so(place: Place) -> None:
    for _ in range(2):
        with pytest.raises(LibraryError, match="no library at"):
            Urza(url=place.url, blobs=place.blobs, create=False)
    place.open().close()
    Urza(url=place.url, blobs=place.blobs, create=False).close()
