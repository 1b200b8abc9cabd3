"""What the evaluator makes of a library's other kernels and of what became of them."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from urza_samples import field_report, judge, manifest, publish

from esper.contracts import Outcome
from esper.errors import LibraryError
from esper.urabrask.chronicle import Chronicle
from esper.urabrask.risk import WEIGHTS, Experience
from esper.urza import Urza

COMPONENTS = {"drift": 0.1, "novelty": 0.05}


@pytest.fixture
def urza(tmp_path: Path) -> Urza:
    return Urza(tmp_path)


def known(urza: Urza, name: str = "low_rank", **changes: Any) -> str:
    artifact_id = publish(urza, name, **changes)
    judge(urza, artifact_id, risk_components=COMPONENTS)
    return artifact_id


def ended(urza: Urza, artifact_id: str, name: str, outcome: Outcome, epoch: int = 9) -> None:
    report = field_report(artifact_id, name, outcome=outcome, ended_epoch=epoch)
    urza.record_field_report(report)


def test_peers_are_other_kernels_for_the_same_site_dtype_and_device(urza: Urza) -> None:
    own = manifest("own")
    peers = [known(urza, "gated"), known(urza, "low_rank")]
    known(urza, "own")
    known(urza, "elsewhere", device="cuda")
    publish(urza, "unjudged")
    found = Chronicle(urza).peers(own)
    assert {peer.report.artifact_id for peer in found} == set(peers)
    assert Chronicle(urza).experience(manifest("gated"), found) == Experience(kernels=1)


def test_a_new_verdict_on_a_peer_is_noticed(urza: Urza) -> None:
    chronicle, own = Chronicle(urza), manifest("own")
    peer = known(urza, "gated")
    assert chronicle.peers(own)[0].report.risk_score == 0.25
    judge(urza, peer, risk_components=COMPONENTS, risk_score=0.75)
    assert chronicle.peers(own)[0].report.risk_score == 0.75


def test_experience_is_that_with_the_design(urza: Urza) -> None:
    chronicle = Chronicle(urza)
    gated, other = known(urza, "gated"), known(urza, "other")
    for epoch, outcome in enumerate(Outcome, start=1):
        ended(urza, gated, "gated", outcome, epoch)
    ended(urza, other, "other", Outcome.CULLED)
    chronicle.read_on()
    assert chronicle.experience(manifest("gated"), []) == Experience(adaptations=4, failures=3)
    ended(urza, gated, "gated", Outcome.FOSSILIZED, epoch=99)
    chronicle.read_on()
    assert chronicle.experience(manifest("gated"), []) == Experience(adaptations=5, failures=3)


@pytest.mark.parametrize("method", ["kernel", "report"])
def test_an_outage_while_reading_on_counts_nothing_twice(
    urza: Urza, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    chronicle, gated, other = Chronicle(urza), known(urza, "gated"), known(urza, "other")
    ended(urza, gated, "gated", Outcome.CULLED)
    ended(urza, other, "other", Outcome.CULLED)
    answer = getattr(urza, method)

    def unless_other(artifact_id: str) -> Any:
        if artifact_id == other:
            raise LibraryError("it is away")
        return answer(artifact_id)

    with monkeypatch.context() as away:
        away.setattr(urza, method, unless_other)
        with pytest.raises(LibraryError, match="it is away"):
            chronicle.read_on()
    chronicle.read_on()
    for name in ("gated", "other"):
        found = chronicle.experience(manifest(name), [])
        assert found == Experience(adaptations=1, failures=1)
    assert len(chronicle.lessons) == 2


@pytest.mark.parametrize("damage", [b"{}", None])
def test_what_cannot_be_read_is_passed_over_and_said_once(
    urza: Urza, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, sound = known(urza, "gated"), known(urza, "other")
    for epoch in (1, 2):
        ended(urza, damaged, "gated", Outcome.CULLED, epoch)
    ended(urza, sound, "other", Outcome.CULLED)
    digest = urza.kernel(damaged).statement.report_digest
    blob = tmp_path / "blobs" / digest[:2] / digest
    if damage is None:
        blob.unlink()
    else:
        blob.write_bytes(damage)
    chronicle = Chronicle(urza)
    for _ in range(2):
        chronicle.read_on()
        assert [peer.report.artifact_id for peer in chronicle.peers(manifest("own"))] == [sound]
    assert chronicle.experience(manifest("other"), []) == Experience(adaptations=1, failures=1)
    assert len(chronicle.lessons) == 1
    [said] = caplog.messages
    assert said.startswith(f"nothing is learned from kernel {damaged}: ")


def test_a_damaged_field_report_does_not_stop_the_evaluator(
    urza: Urza, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended(urza, known(urza, "gated"), "gated", Outcome.CULLED)
    chronicle = Chronicle(urza)
    with closing(sqlite3.connect(tmp_path / "library.sqlite")) as database, database:
        database.execute("UPDATE field_reports SET contract = '{}'")
    for _ in range(2):
        chronicle.read_on()
    assert chronicle.experience(manifest("gated"), []) == Experience()
    [said] = caplog.messages
    assert said.startswith("nothing is learned from the field reports: ")


def test_scores_by_other_rules_teach_nothing(urza: Urza) -> None:
    old = publish(urza, "gated")
    judge(urza, old, risk_components={"error": 0.1, "size": 0.1, "complexity": 0.0})
    ended(urza, old, "gated", Outcome.CULLED)
    chronicle = Chronicle(urza)
    chronicle.read_on()
    assert chronicle.lessons == []
    assert chronicle.experience(manifest("gated"), []) == Experience(adaptations=1, failures=1)


def test_lessons_say_what_was_known_before_and_what_came_of_it(urza: Urza) -> None:
    chronicle, gated = Chronicle(urza), known(urza, "gated")
    old = publish(urza, "of_before_there_were_components")
    judge(urza, old)
    ended(urza, old, "of_before_there_were_components", Outcome.CULLED)
    ended(urza, gated, "gated", Outcome.CANCELLED, epoch=1)
    ended(urza, gated, "gated", Outcome.CULLED, epoch=2)
    ended(urza, gated, "gated", Outcome.FOSSILIZED, epoch=3)
    chronicle.read_on()
    chronicle.read_on()
    assert [lesson.failed for lesson in chronicle.lessons] == [True, False]
    lesson = chronicle.lessons[0]
    assert lesson.blueprint_id == manifest("gated").blueprint_id
    assert lesson.risk_by_rules == pytest.approx(0.15)
    assert lesson.traits.design == "gated"
    assert lesson.traits.numbers["risk.drift"] == COMPONENTS["drift"]
    assert lesson.traits.numbers["half_precision"] == 0.0
    assert set(COMPONENTS) < set(WEIGHTS)
