"""Verdicts: only a signed one counts, the newest holds, and none is forgotten."""

from pathlib import Path
from typing import Any

import pytest
from urza_samples import (
    UNKNOWN,
    audited,
    judge,
    publish,
    report,
    statement,
)

from esper.contracts import KernelStatus
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    LibraryError,
)
from esper.urza import EvaluatorKey, Urza

PENDING, VALIDATED, REJECTED, UNDECIDED = KernelStatus


@pytest.mark.parametrize("status", [VALIDATED, REJECTED, UNDECIDED])
def test_a_verdict_becomes_the_kernel_s_status(urza: Urza, status: KernelStatus) -> None:
    artifact_id = publish(urza)
    verdict = judge(urza, artifact_id, status=status, tags=("small", "fast"))
    record = urza.kernel(artifact_id)
    assert urza.report(artifact_id) == verdict
    assert (record.status, record.tags, record.statement) == (
        status,
        ("small", "fast"),
        statement(verdict),
    )
    assert (record.latency_us, record.memory_bytes, record.risk_score) == (12.5, 4096, 0.25)
    assert urza.audit.entries()[-1].details == {
        "status": status,
        "report": verdict.digest(),
        "replaces": None,
        "key": urza.trusted_key.hex(),
    }


def test_a_verdict_without_measurement_leaves_the_costs_unknown(urza: Urza) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id, status=REJECTED, measurement=None)
    record = urza.kernel(artifact_id)
    assert (record.latency_us, record.memory_bytes) == (None, None)


def test_a_kernel_without_verdict_has_no_report(urza: Urza) -> None:
    artifact_id = publish(urza)
    with pytest.raises(ArtifactNotFoundError, match=f"^kernel {artifact_id} has no report yet$"):
        urza.report(artifact_id)


def test_the_same_verdict_again_changes_nothing(urza: Urza) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id)
    head = urza.audit.head()
    judge(urza, artifact_id)
    assert urza.audit.head() == head


def test_a_newer_verdict_replaces_and_both_are_audited(urza: Urza) -> None:
    artifact_id = publish(urza)
    first = judge(urza, artifact_id)
    second = judge(urza, artifact_id, status=REJECTED, tags=())
    assert urza.kernel(artifact_id).status is REJECTED
    assert urza.report(artifact_id) == second
    said = [entry.details for entry in urza.audit.entries() if entry.event == "kernel.reported"]
    assert [(d["status"], d["report"], d["replaces"]) for d in said] == [
        (VALIDATED, first.digest(), None),
        (REJECTED, second.digest(), first.digest()),
    ]
    urza.verify()


def test_a_replaced_validation_does_not_come_back(urza: Urza) -> None:
    artifact_id = publish(urza)
    first = judge(urza, artifact_id)
    second = judge(urza, artifact_id, status=REJECTED)
    head = urza.audit.head()
    with pytest.raises(
        LibraryError,
        match=f"^kernel {artifact_id}: report {first.digest()} was replaced by a newer one and "
        "cannot validate it again$",
    ):
        judge(urza, artifact_id)
    assert urza.audit.head() == head
    judge(urza, artifact_id, machine="another")  # a fresh verdict may
    assert urza.kernel(artifact_id).status is VALIDATED
    assert judge(urza, artifact_id, status=REJECTED) == second  # and an old refusal still refuses
    assert urza.kernel(artifact_id).status is REJECTED
    urza.verify()


def test_a_verdict_signed_by_a_foreign_key_is_refused(urza: Urza, tmp_path: Path) -> None:
    judge(urza, publish(urza, "gated"))  # from here on the library has a key of its own
    artifact_id = publish(urza)
    foreign = EvaluatorKey.load_or_create(tmp_path / "foreign.pem")
    with pytest.raises(ArtifactIntegrityError, match=r"does not hold for the trusted key"):
        judge(urza, artifact_id, key=foreign)
    assert urza.kernel(artifact_id).status is PENDING


@pytest.mark.parametrize(
    "changes",
    [{"artifact_id": UNKNOWN}, {"status": REJECTED}, {"report_digest": UNKNOWN}],
)
def test_a_statement_about_another_report_is_refused(urza: Urza, changes: dict[str, Any]) -> None:
    artifact_id = publish(urza)
    said = statement(report(artifact_id)).model_copy(update=changes)
    with pytest.raises(
        ArtifactIntegrityError, match=r"^the statement \(artifact, status, report\) is \("
    ):
        urza.record_report(report(artifact_id), said, urza.evaluator_key.sign(said))
    assert urza.kernel(artifact_id).status is PENDING


def test_a_report_without_a_verdict_is_refused(urza: Urza) -> None:
    artifact_id = publish(urza)
    with pytest.raises(ValueError, match=f"^a report on kernel {artifact_id} without a verdict$"):
        judge(urza, artifact_id, status=PENDING)


def test_a_verdict_on_an_unknown_kernel_is_refused(urza: Urza) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"^the library holds no kernel {UNKNOWN}$"):
        judge(urza, UNKNOWN)
    assert audited(urza) == []
