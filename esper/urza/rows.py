"""How contracts are laid out in rows, and how they are read back and checked.

The text of a contract is the truth and its digest the row's key. The other columns are copies for
the index; ``inspection`` compares them with what these functions would write.
"""

import hashlib
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy import Row

from esper.contracts import (
    Blueprint,
    BlueprintRecord,
    BlueprintStatus,
    Contract,
    FieldReport,
    KernelManifest,
    KernelRecord,
    KernelStatement,
    UrabraskValidationReport,
    canonical_json,
)
from esper.errors import ArtifactIntegrityError

ContractT = TypeVar("ContractT", bound=Contract)


def blueprint_values(blueprint: Blueprint) -> dict[str, Any]:
    return {"blueprint_id": blueprint.blueprint_id, "contract": _text(blueprint)}


def blueprint_from(row: Row[Any]) -> Blueprint:
    return _decode(Blueprint, row.contract, f"blueprint {row.blueprint_id}", row.blueprint_id)


def blueprint_status_from(row: Row[Any]) -> BlueprintStatus:
    try:
        return BlueprintStatus(row.status)
    except ValueError as error:
        raise ArtifactIntegrityError(
            f"blueprint {row.blueprint_id}: its row cannot be read: {error}"
        ) from error


def blueprint_record_from(row: Row[Any]) -> BlueprintRecord:
    blueprint = blueprint_from(row)
    try:
        return BlueprintRecord(
            blueprint_id=row.blueprint_id,
            blueprint=blueprint,
            status=row.status,
            log=row.log,
            tamiyo_interest=row.tamiyo_interest,
            urabrask_interest=row.urabrask_interest,
            lease_owner=row.lease_owner,
            lease_expires_at=row.lease_expires_at,
        )
    except ValueError as error:
        raise ArtifactIntegrityError(
            f"blueprint {row.blueprint_id}: its row cannot be read: {error}"
        ) from error


def storable(text: str) -> str:
    """Return ``text`` without what a database cannot keep: a compiler's log may hold anything."""
    encodable = text.encode(errors="replace").decode()
    return encodable.replace("\0", "\N{REPLACEMENT CHARACTER}")


def kernel_values(manifest: KernelManifest) -> dict[str, Any]:
    return {
        "artifact_id": manifest.artifact_id,
        "blueprint_id": manifest.blueprint_id,
        "manifest": _text(manifest),
        "site_digest": manifest.site.digest(),
        "dtype": manifest.dtype,
        "device": manifest.device,
        "num_parameters": manifest.num_parameters,
    }


def verdict_values(report: UrabraskValidationReport, signature: str) -> dict[str, Any]:
    measurement = report.measurement
    return {
        "status": report.status.value,
        "report_digest": report.digest(),
        "signature": signature,
        "tags": canonical_json(list(report.tags)).decode(),
        "latency_us": measurement.forward_p50_us if measurement else None,
        "memory_bytes": measurement.memory_bytes if measurement else None,
        "risk_score": report.risk_score,
    }


def record_from(row: Row[Any]) -> KernelRecord:
    what = f"kernel {row.artifact_id}"
    manifest = _decode(KernelManifest, row.manifest, what, row.artifact_id)
    try:
        return KernelRecord(
            artifact_id=row.artifact_id,
            manifest=manifest,
            status=row.status,
            tags=json.loads(row.tags),
            latency_us=row.latency_us,
            memory_bytes=row.memory_bytes,
            risk_score=row.risk_score,
            statement=_statement_from(row),
            signature=row.signature,
            archived=row.archived,
        )
    except ValueError as error:
        raise ArtifactIntegrityError(f"{what}: its row cannot be read: {error}") from error


def field_report_values(report: FieldReport) -> dict[str, Any]:
    return {
        "report_digest": report.digest(),
        "artifact_id": report.artifact_id,
        "blueprint_id": report.blueprint_id,
        "contract": _text(report),
    }


def field_report_from(row: Row[Any]) -> FieldReport:
    what = f"field report {row.report_digest}"
    return _decode(FieldReport, row.contract, what, row.report_digest)


def _statement_from(row: Row[Any]) -> KernelStatement | None:
    if row.report_digest is None:
        return None
    return KernelStatement(
        artifact_id=row.artifact_id, status=row.status, report_digest=row.report_digest
    )


def _text(contract: Contract) -> str:
    return contract.canonical().decode()


def _decode(kind: type[ContractT], text: str, what: str, digest: str) -> ContractT:
    try:
        contract = kind.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactIntegrityError(f"{what}: its row cannot be read: {error}") from error
    found = hashlib.sha256(text.encode()).hexdigest()  # what was written is canonical
    if found != digest:
        raise ArtifactIntegrityError(f"{what}: its row was altered, the content has digest {found}")
    return contract
