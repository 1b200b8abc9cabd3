"""The audit log: its chain breaks wherever somebody touched it."""

import json
from pathlib import Path

import pytest
from command_line import refusal
from urza_backends import LOCAL, Place
from urza_samples import blueprint, graph, submit

from esper.cli import main
from esper.contracts import LifecycleEvent, SeedState, canonical_json
from esper.errors import AuditError, LibraryError
from esper.urza import GENESIS, AuditEntry, Urza


@pytest.fixture
def five(urza: Urza) -> Urza:
    """A library whose audit log has five rows."""
    for step in range(5):
        record(urza, step)
    return urza


def record(urza: Urza, step: int) -> None:
    urza.record_lifecycle(
        LifecycleEvent(
            seed_id=("blocks.2.mlp", 1),
            source=SeedState.DORMANT,
            target=SeedState.GERMINATED,
            epoch=0,
            step=step,
        )
    )


def tamper(place: Place, *statements: str) -> None:
    with place.tampering() as connection:
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount > 0


def test_a_new_log_is_empty_and_holds(urza: Urza) -> None:
    assert urza.audit.head() == GENESIS
    assert urza.audit.entries() == []
    assert urza.audit.verify() == 0
    assert urza.audit.verify(expected_head=GENESIS) == 0


def test_rows_are_numbered_and_chained(five: Urza) -> None:
    entries = five.audit.entries()
    assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry.previous_hash for entry in entries] == [
        GENESIS,
        *(entry.digest() for entry in entries[:-1]),
    ]
    assert five.audit.head() == entries[-1].digest()
    assert five.audit.verify() == 5


def test_a_lifecycle_event_is_kept_in_full(five: Urza) -> None:
    entry = five.audit.entries()[3]
    assert (entry.actor, entry.event, entry.subject) == (
        "kasmina",
        "seed.lifecycle",
        "blocks.2.mlp[1]",
    )
    assert LifecycleEvent.model_validate(entry.details).step == 3


@pytest.mark.parametrize("score", [1e20, 2.0**63, 2.0**53, 1e21, 1e-7, 0.0])
def test_numbers_of_any_size_are_read_back_as_they_were_hashed(urza: Urza, score: float) -> None:
    urza.set_interest(submit(urza), "tamiyo", score)
    assert urza.audit.verify() == 1 + (score > 0)
    urza.verify()


@LOCAL
@pytest.mark.parametrize("statement", ["UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log"])
def test_the_database_refuses_to_change_the_log(five: Urza, statement: str) -> None:
    with (
        pytest.raises(LibraryError, match=r": the audit log is append-only$"),
        five._database.write() as connection,
    ):
        connection.exec_driver_sql(statement)
    assert five.audit.verify() == 5


@pytest.mark.parametrize(
    "change",
    [
        "timestamp = timestamp + 1",
        "actor = 'tamiyo'",
        "event = 'seed.culled'",
        "subject = 'blocks.2.mlp[0]'",
        "details = '{}'",
        f"previous_hash = '{'0' * 64}'",
        f"hash = '{'0' * 64}'",
        "timestamp = '-Infinity'",
        "details = '{\"step\": 99999999999999999999}'",
    ],
)
@pytest.mark.parametrize("seq", [2, 5])
def test_an_edited_row_is_named(five: Urza, place: Place, change: str, seq: int) -> None:
    tamper(place, f"UPDATE audit_log SET {change} WHERE seq = {seq}")
    with pytest.raises(AuditError, match=f"^audit log: row {seq} was edited, its hash does not"):
        five.audit.verify()


def test_an_unreadable_row_is_named(five: Urza, place: Place) -> None:
    tamper(place, "UPDATE audit_log SET details = '{' WHERE seq = 2")
    with pytest.raises(AuditError, match=r"^audit log: row 2 cannot be read: "):
        five.audit.verify()


def test_an_edited_row_with_a_fresh_hash_breaks_the_next_link(five: Urza, place: Place) -> None:
    forged = five.audit.entries()[1].model_copy(update={"actor": "tamiyo"})
    tamper(
        place,
        f"UPDATE audit_log SET actor = 'tamiyo', hash = '{forged.digest()}' WHERE seq = 2",
    )
    with pytest.raises(AuditError, match=r"^audit log: row 3 does not follow row 2, the chain is"):
        five.audit.verify()


@pytest.mark.parametrize("seq", [1, 3])
def test_a_deleted_row_is_named(five: Urza, place: Place, seq: int) -> None:
    tamper(place, f"DELETE FROM audit_log WHERE seq = {seq}")
    with pytest.raises(
        AuditError, match=f"^audit log: row {seq} is missing, row {seq + 1} stands in its place$"
    ):
        five.audit.verify()


def test_swapped_rows_are_named(five: Urza, place: Place) -> None:
    tamper(
        place,
        "UPDATE audit_log SET seq = -1 WHERE seq = 3",
        "UPDATE audit_log SET seq = 3 WHERE seq = 4",
        "UPDATE audit_log SET seq = 4 WHERE seq = -1",
    )
    with pytest.raises(AuditError, match=r"^audit log: row 3 was edited"):
        five.audit.verify()


def test_an_inserted_row_is_named(five: Urza, place: Place) -> None:
    tamper(
        place,
        "UPDATE audit_log SET seq = 6 WHERE seq = 5",
        "INSERT INTO audit_log SELECT 5, timestamp, actor, event, subject, details, "
        "previous_hash, hash FROM audit_log WHERE seq = 1",
    )
    with pytest.raises(AuditError, match=r"^audit log: row 5 was edited"):
        five.audit.verify()


def test_truncation_shows_against_an_exported_head(
    five: Urza, place: Place, tmp_path: Path
) -> None:
    head = five.audit.export_jsonl(tmp_path / "audit.jsonl")
    assert five.audit.verify(expected_head=head) == 5
    tamper(place, "DELETE FROM audit_log WHERE seq > 3")
    assert five.audit.verify() == 3
    with pytest.raises(
        AuditError, match=f"^audit log: it ends at row 3 without the expected head {head}; "
    ):
        five.audit.verify(expected_head=head)
    record(five, 3)
    record(five, 4)
    with pytest.raises(AuditError, match=r"^audit log: it ends at row 5 without the expected head"):
        five.audit.verify(expected_head=head)


def test_a_head_from_earlier_still_holds(five: Urza) -> None:
    head = five.audit.head()
    record(five, 5)
    assert five.audit.verify(expected_head=head) == 6


def test_the_export_can_be_verified_without_the_library(five: Urza, tmp_path: Path) -> None:
    head = five.audit.export_jsonl(tmp_path / "audit.jsonl")
    lines = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    previous = GENESIS
    for line in lines:
        row = json.loads(line)
        assert canonical_json(row) == line
        claimed = row.pop("hash")
        assert AuditEntry(**row).digest() == claimed
        assert row["previous_hash"] == previous
        previous = claimed
    assert (len(lines), previous) == (5, head)


def test_an_entry_is_written_with_its_change_or_not_at_all(
    five: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.urza.audit._last", lambda _: (4, GENESIS))  # a row that is there
    with pytest.raises(LibraryError, match=r"(?i)^library .*unique"):
        five.submit_blueprint(blueprint(), graph("low_rank"))
    monkeypatch.undo()
    assert five.blueprints() == []
    assert five.audit.verify() == 5


def test_the_command_verifies_and_prints_the_head(
    five: Urza, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["audit", "head", place.url])
    head = tmp_path / "head.txt"
    head.write_text(capsys.readouterr().out)
    assert head.read_text().strip() == five.audit.head()
    record(five, 5)
    main(["audit", "verify", place.url])
    main(["audit", "verify", place.url, "--head", str(head)])
    assert capsys.readouterr().out == "6 rows, the chain holds\n" * 2


def test_the_command_names_what_is_wrong(five: Urza, place: Place, tmp_path: Path) -> None:
    head = tmp_path / "head.txt"
    head.write_text(five.audit.head())
    tamper(place, "DELETE FROM audit_log WHERE seq > 3")
    main(["audit", "verify", place.url])
    with pytest.raises(SystemExit, match=r"^esper audit: audit log: it ends at row 3 without the"):
        main(["audit", "verify", place.url, "--head", str(head)])
    tamper(place, "UPDATE audit_log SET actor = 'x' WHERE seq = 2")
    with pytest.raises(SystemExit, match=r"^esper audit: audit log: row 2 was edited"):
        main(["audit", "verify", place.url])


def test_the_command_takes_a_folder_or_the_environment_s_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Urza(tmp_path).close()
    main(["audit", "verify", str(tmp_path)])
    monkeypatch.setenv("URZA_URL", f"sqlite:///{tmp_path}/library.sqlite")
    main(["audit", "verify"])
    assert capsys.readouterr().out == "0 rows, the chain holds\n" * 2


def test_the_command_makes_no_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = tmp_path / "none"
    said = refusal(["audit", "verify", str(none)], capsys)
    assert said == f"esper audit: no library at {none}: it has no library.sqlite"
    said = refusal(["audit", "head", "://"], capsys)
    assert said == "esper audit: not the URL of a database: '://'"
    assert refusal(["audit", "head"], capsys) == "esper audit: name a library, or set URZA_URL"
    Urza(tmp_path / "library").close()
    (tmp_path / "head.txt").write_text("../head")
    verify = ["audit", "verify", str(tmp_path / "library"), "--head"]
    said = refusal([*verify, str(tmp_path / "head.txt")], capsys)
    assert said.startswith("esper audit: an id is 64 lowercase hexadecimal")
    assert "No such file or directory" in refusal([*verify, str(none)], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.txt", "library"]
