"""Whether the library on disk still is what was written: every row, blob, signature and link."""

import json
from collections import defaultdict
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, select, true

from esper.contracts import BlueprintStatus, KernelStatement, UrabraskValidationReport
from esper.errors import ArtifactIntegrityError, LibraryError
from esper.trust import TrustedKey
from esper.urza.blobs import BlobStore
from esper.urza.keys import Keys
from esper.urza.rows import (
    blueprint_from,
    blueprint_values,
    field_report_from,
    field_report_values,
    kernel_values,
    record_from,
    verdict_values,
)
from esper.urza.schema import (
    audit_log,
    blueprints,
    evolutions,
    field_reports,
    kernels,
    reports,
    tag_set_members,
)

_SUBMITTED = {
    "status": BlueprintStatus.UNVALIDATED.value,
    "log": "",
    "tamiyo_interest": 0.0,
    "urabrask_interest": 0.0,
    "lease_owner": None,
}


def inspect_contents(connection: Connection, blobs: BlobStore, keys: Keys) -> None:
    """Raise an EsperError naming the first row that is not backed by what it stands for.

    The audit log's own chain is for ``AuditLog.verify``; here only its links to the rows count.
    """
    audited, evolved = _audited_blueprints(connection)
    for row in connection.execute(select(blueprints)):
        _inspect_blueprint(row, blobs)
        _compare(row, audited[row.blueprint_id])
    _inspect_evolutions(connection, evolved)
    tag_sets = _tag_sets(connection)
    for row in connection.execute(select(kernels)):
        _inspect_kernel(row, tag_sets[row.tag_set], blobs)
    for row in connection.execute(select(reports)):
        _inspect_report(row, blobs, keys.trusted_key)
    for row in connection.execute(select(field_reports)):
        _compare(row, field_report_values(field_report_from(row)))
    _inspect_links(connection, "blueprint.submitted", blueprints.c.blueprint_id)
    _inspect_links(connection, "kernel.published", kernels.c.artifact_id)
    _inspect_links(connection, "kernel.reported", reports.c.artifact_id)
    _inspect_links(connection, "adaptation.reported", field_reports.c.report_digest)
    archived = kernels.c.archived == true()
    _inspect_links(connection, "kernel.archived", kernels.c.artifact_id, archived)


def _audited_blueprints(
    connection: Connection,
) -> tuple[dict[str, dict[str, Any]], set[tuple[str, str]]]:
    """Replay the audit log: what each blueprint was last given, and what evolved from what."""
    changes = (
        select(audit_log.c.event, audit_log.c.subject, audit_log.c.details)
        .where(audit_log.c.event.like("blueprint.%"))
        .order_by(audit_log.c.seq)
    )
    audited: dict[str, dict[str, Any]] = defaultdict(_SUBMITTED.copy)
    evolved = set()
    for event, subject, text in connection.execute(changes):
        details = json.loads(text)
        if event == "blueprint.status":
            audited[subject] |= {
                "status": details["target"],
                "log": details["log"],
                "lease_owner": details.get("owner"),
            }
        elif event == "blueprint.interest":
            # JSON writes a large one with all its digits, which are read as an integer.
            audited[subject] |= {role: float(score) for role, score in details.items()}
        else:
            evolved |= {(subject, cause) for cause in details.get("evolved_from", [])}
    return audited, evolved


def _inspect_evolutions(connection: Connection, audited: set[tuple[str, str]]) -> None:
    stored = {
        (row.blueprint_id, row.report_digest) for row in connection.execute(select(evolutions))
    }
    if stored != audited:
        raise LibraryError(
            f"evolutions holds {len(stored)} rows, the audit log {len(audited)}; they differ in "
            f"{sorted(stored ^ audited)[:3]}"
        )


def _tag_sets(connection: Connection) -> dict[int, set[str]]:
    members: dict[int, set[str]] = defaultdict(set)
    for row in connection.execute(select(tag_set_members)):
        members[row.tag_set].add(row.tag)
    return members


def _inspect_blueprint(row: Row[Any], blobs: BlobStore) -> None:
    blueprint = blueprint_from(row)
    _compare(row, blueprint_values(blueprint))
    blobs.get(blueprint.graph_digest)


def _inspect_kernel(row: Row[Any], tags: set[str], blobs: BlobStore) -> None:
    record = record_from(row)
    _compare(row, kernel_values(record.manifest))
    for digest in record.manifest.files.values():
        blobs.get(digest)
    if record.statement is not None:
        _compare(row, verdict_values(_report(record.statement.report_digest, blobs), row.signature))
    if tags != set(record.tags):
        raise ArtifactIntegrityError(
            f"kernel {record.artifact_id} is found by tags {sorted(tags)}, but has "
            f"{sorted(record.tags)}"
        )


def _inspect_report(row: Row[Any], blobs: BlobStore, trusted: TrustedKey) -> None:
    report = _report(row.report_digest, blobs)
    _compare(row, {"artifact_id": report.artifact_id, "status": report.status.value})
    trusted.verify(
        KernelStatement(
            artifact_id=report.artifact_id, status=report.status, report_digest=row.report_digest
        ),
        row.signature,
    )


def _report(digest: str, blobs: BlobStore) -> UrabraskValidationReport:
    return UrabraskValidationReport.model_validate_json(blobs.get(digest))


def _compare(row: Row[Any], expected: dict[str, Any]) -> None:
    for column, value in expected.items():
        found = row._mapping[column]
        if found != value:
            raise ArtifactIntegrityError(
                f"{column} of row {row.position} is {found!r}, but must be {value!r}"
            )


def _inspect_links(
    connection: Connection, event: str, key: Column[Any], *conditions: ColumnElement[bool]
) -> None:
    """Each row has its audit entry and the reverse, so no row was slipped in or taken out."""
    table: Table = key.table
    stored = sorted(connection.execute(select(key).where(*conditions)).scalars())
    audited = sorted(
        connection.execute(select(audit_log.c.subject).where(audit_log.c.event == event)).scalars()
    )
    if stored != audited:
        differing = sorted(set(stored) ^ set(audited))
        raise LibraryError(
            f"{table.name} holds {len(stored)} rows, the audit log {len(audited)} {event!r} "
            f"entries; they differ in {differing[:3]}"
        )
