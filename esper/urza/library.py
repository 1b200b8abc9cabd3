"""Urza, the library: the only store of blueprints, kernels, verdicts and what became of them.

A row never speaks of a blob that is not there: blobs are written and synced first, then the row
and its audit entry in one transaction. A crash in between leaves a blob that no row names.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Column, ColumnElement, Connection, Row, insert, select, update

from esper.contracts import (
    Blueprint,
    BlueprintStatus,
    FieldReport,
    KernelBundle,
    KernelManifest,
    KernelQuery,
    KernelRecord,
    KernelStatement,
    KernelStatus,
    LifecycleEvent,
    UrabraskValidationReport,
)
from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError, LibraryError
from esper.trust import verify_files
from esper.urza.audit import AuditLog
from esper.urza.blobs import BlobStore, checked_digest
from esper.urza.database import Database, blueprints, field_reports, kernels, reports
from esper.urza.inspection import inspect_contents
from esper.urza.lineage import lineage_graph
from esper.urza.rows import (
    blueprint_from,
    blueprint_status_from,
    blueprint_values,
    field_report_from,
    field_report_values,
    kernel_values,
    record_from,
    verdict_values,
)
from esper.urza.signing import EvaluatorKey

_LEGAL_STATUS_CHANGES = {
    (BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING),
    (BlueprintStatus.COMPILING, BlueprintStatus.COMPILED),
    (BlueprintStatus.COMPILING, BlueprintStatus.INVALID),
    (BlueprintStatus.COMPILING, BlueprintStatus.UNVALIDATED),  # its forge was lost
    (BlueprintStatus.COMPILED, BlueprintStatus.COMPILING),  # again, for another release of torch
}


class Urza:
    """One library folder. Every method blocks on the disk and may be called from any thread.

    Ids that are no SHA-256 raise ValueError, unknown ones ArtifactNotFoundError, a database that
    cannot be used LibraryError. What is read is checked against its digest, and altered content
    raises ArtifactIntegrityError.

    Args:
        root: the library's folder. It is made if it is not there; any number of processes may
            have it open. LibraryError if no folder can be there.
        key_path: PEM file of the evaluator's private key, made if it is not there; by default
            ``keys/evaluator.pem`` in the library. Elsewhere, those who may write to the library
            need not be able to sign verdicts.
    """

    def __init__(self, root: Path | str, *, key_path: Path | None = None) -> None:
        root = _made_folder(Path(root).absolute())
        self._database = Database(root / "library.sqlite")
        self._blobs = BlobStore(root / "blobs")
        self.audit = AuditLog(self._database)
        self.evaluator_key = EvaluatorKey.load_or_create(key_path or root / "keys/evaluator.pem")
        self.trusted_key = self.evaluator_key.trusted()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def submit_blueprint(self, blueprint: Blueprint, graph: bytes) -> str:
        """Store a blueprint and its canonical graph, UNVALIDATED; return its id.

        Submitting it again changes nothing. Its parents must be known, so that the lineage never
        points outside the library.
        """
        blueprint_id = blueprint.blueprint_id
        found = hashlib.sha256(graph).hexdigest()
        if found != blueprint.graph_digest:
            raise ArtifactIntegrityError(
                f"blueprint {blueprint_id}: the graph has digest {found}, "
                f"expected {blueprint.graph_digest}"
            )
        for parent in blueprint.parents:
            self.blueprint_status(parent)
        self._blobs.put(graph)
        with self._database.write() as connection:
            if not _exists(connection, blueprints.c.blueprint_id, blueprint_id):
                connection.execute(insert(blueprints).values(**blueprint_values(blueprint)))
                self.audit.append(
                    connection,
                    actor="urza",
                    event="blueprint.submitted",
                    subject=blueprint_id,
                    details={"design": blueprint.design.name, "graph": blueprint.graph_digest},
                )
        return blueprint_id

    def blueprint(self, blueprint_id: str) -> Blueprint:
        return blueprint_from(self._blueprint_row(blueprint_id))

    def blueprint_status(self, blueprint_id: str) -> tuple[BlueprintStatus, str]:
        """Return the status and the log of the last change."""
        row = self._blueprint_row(blueprint_id)
        return blueprint_status_from(row), row.log

    def graph(self, blueprint_id: str) -> bytes:
        return self._blobs.get(self.blueprint(blueprint_id).graph_digest)

    def blueprints(self, status: BlueprintStatus | None = None) -> list[str]:
        """Return the ids, oldest first."""
        chosen = select(blueprints.c.blueprint_id).order_by(blueprints.c.position)
        if status is not None:
            chosen = chosen.where(blueprints.c.status == status)
        with self._database.read() as connection:
            return list(connection.execute(chosen).scalars())

    def set_blueprint_status(
        self, blueprint_id: str, status: BlueprintStatus, log: str = ""
    ) -> None:
        """Take a legal edge, or raise LibraryError: of two forges only one gets to COMPILING."""
        with self._database.write() as connection:
            source = blueprint_status_from(_blueprint_row(connection, blueprint_id))
            if (source, status) not in _LEGAL_STATUS_CHANGES:
                raise LibraryError(
                    f"blueprint {blueprint_id} is {source}; it cannot become {status}"
                )
            connection.execute(
                update(blueprints)
                .where(blueprints.c.blueprint_id == blueprint_id)
                .values(status=status, log=log)
            )
            self.audit.append(
                connection,
                actor="tezzeret",
                event="blueprint.status",
                subject=blueprint_id,
                details={"source": source, "target": status, "log": log},
            )

    def publish_kernel(self, manifest: KernelManifest, files: Mapping[str, bytes]) -> str:
        """Store an artifact, PENDING_BENCHMARKING, of a known blueprint; return its id.

        ``files`` must be exactly those that the manifest names, byte for byte. Publishing it again
        changes nothing.
        """
        verify_files(manifest, files)
        self.blueprint_status(manifest.blueprint_id)
        for data in files.values():
            self._blobs.put(data)
        artifact_id = manifest.artifact_id
        with self._database.write() as connection:
            if not _exists(connection, kernels.c.artifact_id, artifact_id):
                connection.execute(insert(kernels).values(**kernel_values(manifest)))
                self.audit.append(
                    connection,
                    actor="tezzeret",
                    event="kernel.published",
                    subject=artifact_id,
                    details={"blueprint": manifest.blueprint_id, "files": manifest.files},
                )
        return artifact_id

    def kernel(self, artifact_id: str) -> KernelRecord:
        with self._database.read() as connection:
            return record_from(_kernel_row(connection, artifact_id))

    def kernels(self, status: KernelStatus | None = None) -> list[KernelRecord]:
        """Return the records, oldest first."""
        conditions = [] if status is None else [kernels.c.status == status]
        return self._records(*conditions)

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        """Return a kernel of any status with its bytes; a loader calls ``verify_bundle`` on it."""
        record = self.kernel(artifact_id)
        files = {name: self._blobs.get(digest) for name, digest in record.manifest.files.items()}
        return KernelBundle(record=record, files=files)

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        """Return VALIDATED kernels that fit, best first.

        Ranked by preferred tags matched, risk, number of parameters and id. Latency only bounds:
        a ranking by a noisy measurement would change from machine to machine. A kernel whose
        latency or memory is unknown meets no bound on it.
        """
        candidates = [r for r in self._records(*_conditions(query)) if _tags_fit(r, query)]
        return sorted(candidates, key=lambda record: _rank(record, query))[: query.limit]

    def record_report(
        self, report: UrabraskValidationReport, statement: KernelStatement, signature: str
    ) -> None:
        """Make a signed verdict the kernel's status; the report it names is kept for good.

        A newer report replaces an older one. The same report again changes nothing, and a
        VALIDATED that was replaced does not come back.
        """
        self.trusted_key.verify(statement, signature)
        _check_statement(report, statement)
        self.kernel(report.artifact_id)
        self._blobs.put(report.canonical())
        with self._database.write() as connection:
            replaced = _kernel_row(connection, report.artifact_id).report_digest
            if replaced != statement.report_digest:
                _refuse_replay(connection, statement)
                self._replace_verdict(connection, report, signature, replaced)

    def report(self, artifact_id: str) -> UrabraskValidationReport:
        statement = self.kernel(artifact_id).statement
        if statement is None:
            raise ArtifactNotFoundError(f"kernel {artifact_id} has no report yet")
        return UrabraskValidationReport.model_validate_json(
            self._blobs.get(statement.report_digest)
        )

    def record_field_report(self, report: FieldReport) -> None:
        """Keep how an adaptation ended; the same report again changes nothing."""
        values = field_report_values(report)
        self.kernel(report.artifact_id)
        self.blueprint_status(report.blueprint_id)
        with self._database.write() as connection:
            if not _exists(connection, field_reports.c.report_digest, values["report_digest"]):
                connection.execute(insert(field_reports).values(**values))
                self.audit.append(
                    connection,
                    actor="tamiyo",
                    event="adaptation.reported",
                    subject=values["report_digest"],
                    details={"artifact": report.artifact_id, "outcome": report.outcome},
                )

    def field_reports(self) -> list[FieldReport]:
        """Return all of them, oldest first."""
        with self._database.read() as connection:
            return _field_reports(connection)

    def record_lifecycle(self, event: LifecycleEvent) -> None:
        """Write an edge that a seed took to the audit log; each call adds an entry."""
        layer_name, seed_idx = event.seed_id
        with self._database.write() as connection:
            self.audit.append(
                connection,
                actor="kasmina",
                event="seed.lifecycle",
                subject=f"{layer_name}[{seed_idx}]",
                details=event.model_dump(mode="json"),
            )

    def lineage(self) -> dict[str, Any]:
        """Return blueprints, kernels and adaptations as a graph; see ``lineage_graph``."""
        with self._database.read() as connection:
            stored = connection.execute(select(blueprints).order_by(blueprints.c.position))
            return lineage_graph(
                [(blueprint_from(row), blueprint_status_from(row)) for row in stored],
                _records(connection),
                _field_reports(connection),
            )

    def verify(self) -> None:
        """Check every stored byte, row and link; raise an EsperError naming the first fault."""
        self.audit.verify()
        with self._database.read() as connection:
            inspect_contents(connection, self._blobs, self.trusted_key)

    def _blueprint_row(self, blueprint_id: str) -> Row[Any]:
        with self._database.read() as connection:
            return _blueprint_row(connection, blueprint_id)

    def _records(self, *conditions: ColumnElement[bool]) -> list[KernelRecord]:
        with self._database.read() as connection:
            return _records(connection, *conditions)

    def _replace_verdict(
        self,
        connection: Connection,
        report: UrabraskValidationReport,
        signature: str,
        replaced: str | None,
    ) -> None:
        values = verdict_values(report, signature)
        connection.execute(
            insert(reports).values(
                artifact_id=report.artifact_id,
                status=values["status"],
                report_digest=values["report_digest"],
                signature=signature,
            )
        )
        connection.execute(
            update(kernels).where(kernels.c.artifact_id == report.artifact_id).values(**values)
        )
        self.audit.append(
            connection,
            actor="urabrask",
            event="kernel.reported",
            subject=report.artifact_id,
            details={
                "status": report.status,
                "report": values["report_digest"],
                "replaces": replaced,
                "key": self.trusted_key.hex(),
            },
        )


def _made_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LibraryError(f"library {path}: cannot be a folder: {error.strerror}") from error
    return path


def _exists(connection: Connection, column: Column[Any], key: str) -> bool:
    return connection.execute(select(column).where(column == key)).first() is not None


def _blueprint_row(connection: Connection, blueprint_id: str) -> Row[Any]:
    chosen = select(blueprints).where(blueprints.c.blueprint_id == checked_digest(blueprint_id))
    row = connection.execute(chosen).first()
    if row is None:
        raise ArtifactNotFoundError(f"the library holds no blueprint {blueprint_id}")
    return row


def _kernel_row(connection: Connection, artifact_id: str) -> Row[Any]:
    chosen = select(kernels).where(kernels.c.artifact_id == checked_digest(artifact_id))
    row = connection.execute(chosen).first()
    if row is None:
        raise ArtifactNotFoundError(f"the library holds no kernel {artifact_id}")
    return row


def _records(connection: Connection, *conditions: ColumnElement[bool]) -> list[KernelRecord]:
    chosen = select(kernels).where(*conditions).order_by(kernels.c.position)
    return [record_from(row) for row in connection.execute(chosen)]


def _field_reports(connection: Connection) -> list[FieldReport]:
    chosen = select(field_reports).order_by(field_reports.c.position)
    return [field_report_from(row) for row in connection.execute(chosen)]


def _check_statement(report: UrabraskValidationReport, statement: KernelStatement) -> None:
    if report.status is KernelStatus.PENDING_BENCHMARKING:
        raise ValueError(f"a report on kernel {report.artifact_id} without a verdict")
    stated = (statement.artifact_id, statement.status, statement.report_digest)
    reported = (report.artifact_id, report.status, report.digest())
    if stated != reported:
        raise ArtifactIntegrityError(
            f"the statement (artifact, status, report) is {stated}, the report's is {reported}"
        )


def _refuse_replay(connection: Connection, statement: KernelStatement) -> None:
    """An old VALIDATED, valid signature and all, must not undo a later REJECTED."""
    past = select(reports.c.position).where(
        reports.c.artifact_id == statement.artifact_id,
        reports.c.report_digest == statement.report_digest,
    )
    if statement.status is KernelStatus.VALIDATED and connection.execute(past).first():
        raise LibraryError(
            f"kernel {statement.artifact_id}: report {statement.report_digest} was replaced by a "
            "newer one and cannot validate it again"
        )


def _conditions(query: KernelQuery) -> list[ColumnElement[bool]]:
    bounds = [
        (kernels.c.latency_us, query.max_latency_us),
        (kernels.c.memory_bytes, query.max_memory_bytes),
        (kernels.c.num_parameters, query.max_parameters),
    ]
    return [
        kernels.c.status == KernelStatus.VALIDATED,
        kernels.c.site_digest == query.site.digest(),
        kernels.c.dtype == query.dtype,
        kernels.c.device == query.device,
        *(column <= bound for column, bound in bounds if bound is not None),
    ]


def _tags_fit(record: KernelRecord, query: KernelQuery) -> bool:
    tags = frozenset(record.tags)
    return query.required_tags <= tags and not query.excluded_tags & tags


def _rank(record: KernelRecord, query: KernelQuery) -> tuple[int, float, int, str]:
    preferred = len(query.preferred_tags.intersection(record.tags))
    risk = 1.0 if record.risk_score is None else record.risk_score
    return -preferred, risk, record.manifest.num_parameters, record.artifact_id
