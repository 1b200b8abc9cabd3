"""Urza, the library: the only store of blueprints, kernels, verdicts and what became of them.

A row never speaks of a blob that is not there: blobs are written and synced first, then the row
and its audit entry in one transaction. A crash in between leaves a blob that no row names.
"""

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    bindparam,
    insert,
    select,
    true,
    update,
)

import esper.urza.compilations as compilations
import esper.urza.forge_status as forge_status
import esper.urza.kernel_leases as kernel_leases
from esper.contracts import (
    Blueprint,
    BlueprintRecord,
    BlueprintStatus,
    Compilation,
    FieldReport,
    ForgeStatus,
    KernelBundle,
    KernelManifest,
    KernelQuery,
    KernelRecord,
    KernelStatement,
    KernelStatus,
    LifecycleEvent,
    Pipeline,
    RecompilationProspect,
    UrabraskValidationReport,
    canonical_json,
)
from esper.errors import ArtifactIntegrityError, ArtifactNotFoundError, ConflictError
from esper.trust import TrustedKey, verify_files
from esper.urza.audit import AuditLog
from esper.urza.blobs import checked_digest, open_blobs
from esper.urza.database import Database, sqlite_url
from esper.urza.folders import made_folder
from esper.urza.inspection import inspect_contents
from esper.urza.keys import Keys
from esper.urza.leases import (
    UNLEASED,
    check_owner,
    check_terms,
    lease_values,
    next_claimable,
)
from esper.urza.lineage import lineage_graph
from esper.urza.query import check_fit, fastest_first, find
from esper.urza.rows import (
    blueprint_from,
    blueprint_record_from,
    blueprint_status_from,
    blueprint_values,
    field_report_from,
    field_report_values,
    kernel_values,
    record_from,
    storable,
    verdict_values,
)
from esper.urza.schema import (
    blueprints,
    evolutions,
    field_reports,
    kernels,
    reports,
    tag_set_members,
    tag_sets,
)
from esper.urza.signing import EvaluatorKey

# Made once, since each load executes it.
_KERNEL = select(kernels).where(kernels.c.artifact_id == bindparam("sought_id"))

_LEGAL_STATUS_CHANGES = {
    (BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING),
    (BlueprintStatus.COMPILING, BlueprintStatus.COMPILED),
    (BlueprintStatus.COMPILING, BlueprintStatus.INVALID),
    (BlueprintStatus.COMPILING, BlueprintStatus.UNVALIDATED),  # its forge was lost
    (BlueprintStatus.COMPILED, BlueprintStatus.COMPILING),  # again, for another release of torch
}


class Urza:
    """One library. Every method blocks on the disk or the network, and any thread may call it.

    Ids that are no SHA-256 raise ValueError, unknown ones ArtifactNotFoundError, a database or
    blobs that cannot be used LibraryError. What is read is checked against its digest, and altered
    content raises ArtifactIntegrityError. Nothing is ever deleted: the lineage names it.

    An argument says where a part lies; else it is in the folder ``root``; without a folder an
    environment variable says it. ValueError if nothing does.

    Args:
        root: the library's folder. It is made if it is not there; any number of processes may
            have it open. LibraryError if no folder can be there.
        url: the database (``URZA_URL``), SQLite by default: ``sqlite:////folder/library.sqlite``,
            ``postgresql://user@host/name``.
        blobs: folder or URL of the blobs (``URZA_BLOBS``): ``s3://bucket/prefix``.
        key_path: PEM file of the evaluator's private key, see :class:`esper.urza.keys.Keys`; by
            default ``keys/evaluator.pem`` in the folder. Outside of the library, those who may
            write to the library need not be able to sign verdicts.
        trusted_key: the evaluator's public key or the path of its PEM file, for all who sign
            nothing themselves.
        create: make what is not there. Otherwise LibraryError, and nothing is made.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        url: str | None = None,
        blobs: str | None = None,
        key_path: Path | None = None,
        trusted_key: TrustedKey | Path | None = None,
        create: bool = True,
    ) -> None:
        folder = None if root is None else Path(root).absolute()
        if folder and create:
            made_folder(folder)
        self._database = Database(
            url or (sqlite_url(folder / "library.sqlite") if folder else _environment("URZA_URL")),
            create=create,
        )
        self._blobs = open_blobs(
            blobs or (str(folder / "blobs") if folder else _environment("URZA_BLOBS"))
        )
        self.audit = AuditLog(self._database)
        self._keys = Keys(key_path, trusted_key, folder and folder / "keys/evaluator.pem")

    @property
    def evaluator_key(self) -> EvaluatorKey:
        """The key that verdicts are signed with, made when it is first asked for."""
        return self._keys.evaluator_key

    @property
    def trusted_key(self) -> TrustedKey:
        """The public key that verdicts must be signed for; LibraryError while there is none."""
        return self._keys.trusted_key

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

    def submit_blueprint(
        self, blueprint: Blueprint, graph: bytes, *, evolved_from: Collection[str] = ()
    ) -> str:
        """Store a blueprint and its canonical graph, UNVALIDATED; return its id.

        ``evolved_from`` are the digests of the field reports that it was made in answer to.
        Submitting it again changes nothing. Its parents and those reports must be known, so that
        the lineage never points outside the library.
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
        causes = sorted({checked_digest(report_digest) for report_digest in evolved_from})
        self._blobs.put(graph)
        with self._database.write() as connection:
            if not _exists(connection, blueprints.c.blueprint_id, blueprint_id):
                connection.execute(insert(blueprints).values(**blueprint_values(blueprint)))
                _add_evolutions(connection, blueprint_id, causes)
                self.audit.append(
                    connection,
                    actor="urza",
                    event="blueprint.submitted",
                    subject=blueprint_id,
                    details={
                        "design": blueprint.design.name,
                        "graph": blueprint.graph_digest,
                        "evolved_from": causes,
                    },
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

    def blueprint_record(self, blueprint_id: str) -> BlueprintRecord:
        return blueprint_record_from(self._blueprint_row(blueprint_id))

    def blueprint_records(self, status: BlueprintStatus | None = None) -> list[BlueprintRecord]:
        """Return the records, oldest first."""
        chosen = select(blueprints).order_by(blueprints.c.position)
        if status is not None:
            chosen = chosen.where(blueprints.c.status == status)
        with self._database.read() as connection:
            return [blueprint_record_from(row) for row in connection.execute(chosen)]

    def set_blueprint_status(
        self, blueprint_id: str, status: BlueprintStatus, log: str = "", *, owner: str | None = None
    ) -> None:
        """Take a legal edge, or raise LibraryError: of two forges only one gets to COMPILING.

        A blueprint that is leased takes its edges from ``owner`` alone, who has a LeaseError
        coming when the lease ran out and somebody else took it over; without a lease, or after it
        ran out, ``owner`` may be None.
        """
        with self._database.write() as connection:
            row = _blueprint_row(connection, blueprint_id)
            source = blueprint_status_from(row)
            check_owner(row, owner, self._database.now_s(connection))
            if (source, status) not in _LEGAL_STATUS_CHANGES:
                raise ConflictError(
                    f"blueprint {blueprint_id} is {source}; it cannot become {status}"
                )
            self._change_status(connection, row, status, log)

    def claim_blueprint(
        self, owner: str, lease_s: float, *, blueprint_id: str | None = None
    ) -> str | None:
        """Lease what is most worth compiling to ``owner``, COMPILING; None if nothing waits.

        What waits is UNVALIDATED, or COMPILING while its lease ran out or without one. The sum of
        the interests decides, then age. By id a certain blueprint is claimed, even a COMPILED one;
        None if it cannot be had. ``owner`` must be unique to the forge, and renew the lease
        before ``lease_s`` seconds are over.
        """
        check_terms(owner, lease_s)
        owner = storable(owner)
        with self._database.write() as connection:
            if blueprint_id is not None:
                _blueprint_row(connection, blueprint_id)
            now_s = self._database.now_s(connection)
            row = next_claimable(connection, now_s, blueprint_id)
            if row is None:
                return None
            lease = lease_values(row, owner, now_s + lease_s)
            self._change_status(connection, row, BlueprintStatus.COMPILING, "", lease)
            return str(row.blueprint_id)

    def renew_lease(self, blueprint_id: str, owner: str, lease_s: float) -> None:
        """Let the lease end ``lease_s`` seconds from now; LeaseError if somebody else has it.

        No change of state, so it leaves no audit entry.
        """
        check_terms(owner, lease_s)
        with self._database.write() as connection:
            now_s = self._database.now_s(connection)
            check_owner(_blueprint_row(connection, blueprint_id), owner, now_s)
            connection.execute(
                update(blueprints)
                .where(blueprints.c.blueprint_id == blueprint_id)
                .values(lease_expires_at=now_s + lease_s)
            )

    def release_blueprint(self, blueprint_id: str, owner: str, log: str = "") -> None:
        """Give a leased blueprint back as it was when it was claimed; LeaseError if it is not."""
        with self._database.write() as connection:
            row = _blueprint_row(connection, blueprint_id)
            check_owner(row, owner, self._database.now_s(connection))
            self._change_status(connection, row, BlueprintStatus(row.leased_from), log)

    def finish_compilation(self, compilation: Compilation) -> None:
        """Settle a leased blueprint by what came of compiling it; LeaseError if it is not.

        It becomes COMPILED with a kernel, INVALID without one, unless it was COMPILED before: its
        other kernels are as good as they were.
        """
        with self._database.write() as connection:
            row = _blueprint_row(connection, compilation.blueprint_id)
            if compilation.artifact_id is not None:
                _kernel_row(connection, compilation.artifact_id)
            now_s = self._database.now_s(connection)
            check_owner(row, compilation.owner, now_s)
            recompiled = row.leased_from == BlueprintStatus.COMPILED
            good = recompiled or compilation.artifact_id is not None
            compilations.record(connection, compilation, recompiled=recompiled, now_s=now_s)
            status = BlueprintStatus.COMPILED if good else BlueprintStatus.INVALID
            self._change_status(connection, row, status, compilation.log)

    def was_tried(
        self, blueprint_id: str, pipeline: Pipeline, device: str, torch_version: str
    ) -> bool:
        """Tell whether a forge has tried to make such a kernel, with success or without."""
        with self._database.read() as connection:
            return compilations.tried(
                connection, checked_digest(blueprint_id), pipeline, device, torch_version
            )

    def recompilation_prospects(
        self, device: str, torch_version: str, pipelines: Collection[Pipeline]
    ) -> list[RecompilationProspect]:
        """Return what one of ``pipelines`` might make anew, the most interesting first."""
        with self._database.read() as connection:
            return compilations.prospects(connection, device, torch_version, pipelines)

    def forge_status(self, owner: str | None = None, *, window_s: float = 3600.0) -> ForgeStatus:
        """Return what waits and who has it, and what was done in the last ``window_s`` seconds.

        The latter by ``owner``, or by all.
        """
        if not (math.isfinite(window_s) and window_s > 0):
            raise ValueError(
                f"a window must last a finite, positive number of seconds, got {window_s}"
            )
        with self._database.read() as connection:
            now_s = self._database.now_s(connection)
            return forge_status.status(connection, now_s, owner, window_s)

    def set_interest(
        self, blueprint_id: str, role: Literal["tamiyo", "urabrask"], score: float
    ) -> None:
        """Say how much a role wants a blueprint compiled: any finite number from 0 on."""
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"an interest must be finite and not negative, got {score}")
        column = f"{role}_interest"
        with self._database.write() as connection:
            if _blueprint_row(connection, blueprint_id)._mapping[column] != score:
                connection.execute(
                    update(blueprints)
                    .where(blueprints.c.blueprint_id == blueprint_id)
                    .values({column: score})
                )
                self.audit.append(
                    connection,
                    actor=role,
                    event="blueprint.interest",
                    subject=blueprint_id,
                    details={column: score},
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

    def claim_kernel(
        self,
        owner: str,
        lease_s: float,
        *,
        device: str,
        torch_version: str,
        artifact_id: str | None = None,
    ) -> str | None:
        """Lease the oldest kernel that waits for a verdict to ``owner``; None if there is none.

        Only kernels for that device and release of torch are given out, as nobody else can judge
        them. By id a certain one is claimed, if it can be had. The lease bars other claims until
        it runs out or is given back; it leaves no audit entry.
        """
        check_terms(owner, lease_s)
        with self._database.write() as connection:
            if artifact_id is not None:
                _kernel_row(connection, artifact_id)
            return kernel_leases.claim(
                connection,
                storable(owner),
                self._database.now_s(connection),
                lease_s,
                device=device,
                torch_version=torch_version,
                artifact_id=artifact_id,
            )

    def renew_kernel_lease(self, artifact_id: str, owner: str, lease_s: float) -> None:
        """Let the lease end ``lease_s`` seconds from now; LeaseError if somebody else has it."""
        check_terms(owner, lease_s)
        with self._database.write() as connection:
            _kernel_row(connection, artifact_id)
            expires_at_s = self._database.now_s(connection) + lease_s
            kernel_leases.renew(connection, artifact_id, owner, expires_at_s)

    def release_kernel(self, artifact_id: str, owner: str) -> None:
        """Let others claim a kernel; LeaseError if somebody else has it."""
        with self._database.write() as connection:
            _kernel_row(connection, artifact_id)
            kernel_leases.release(connection, artifact_id, owner)

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

    def kernel_file(self, artifact_id: str, name: str) -> bytes:
        """Return one of the files that the kernel's manifest names."""
        digest = self.kernel(artifact_id).manifest.files.get(name)
        if digest is None:
            raise ArtifactNotFoundError(f"kernel {artifact_id} has no file {name!r}")
        return self._blobs.get(digest)

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        """Return VALIDATED kernels that fit, best first.

        Ranked by preferred tags matched, risk, number of parameters and id; of one blueprint's
        kernels that were found, the fastest pipeline's comes first. Latency only bounds: a ranking
        by a noisy measurement would change from machine to machine. A kernel whose latency or
        memory is unknown meets no bound on it.
        """
        with self._database.read() as connection:
            records = [record_from(row) for row in find(connection, query)]
        for record in records:
            check_fit(record, query)
        return fastest_first(records, query.preferred_tags)

    def archive(self, artifact_id: str) -> None:
        """Let queries no longer find a kernel. It can still be fetched; again changes nothing."""
        with self._database.write() as connection:
            if not _kernel_row(connection, artifact_id).archived:
                connection.execute(
                    update(kernels)
                    .where(kernels.c.artifact_id == artifact_id)
                    .values(archived=true())
                )
                self.audit.append(
                    connection,
                    actor="urza",
                    event="kernel.archived",
                    subject=artifact_id,
                    details={},
                )

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
            row = _kernel_row(connection, report.artifact_id)
            if row.report_digest != statement.report_digest:
                _refuse_replay(connection, statement)
                self._replace_verdict(connection, row, report, signature)

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
                [
                    (row.report_digest, row.blueprint_id)
                    for row in connection.execute(select(evolutions))
                ],
            )

    def verify(self) -> None:
        """Check every stored byte, row and link; raise an EsperError naming the first fault."""
        self.audit.verify()
        with self._database.read() as connection:
            inspect_contents(connection, self._blobs, self._keys)

    def _blueprint_row(self, blueprint_id: str) -> Row[Any]:
        with self._database.read() as connection:
            return _blueprint_row(connection, blueprint_id)

    def _records(self, *conditions: ColumnElement[bool]) -> list[KernelRecord]:
        with self._database.read() as connection:
            return _records(connection, *conditions)

    def _change_status(
        self,
        connection: Connection,
        row: Row[Any],
        status: BlueprintStatus,
        log: str,
        lease: Mapping[str, Any] = UNLEASED,
    ) -> None:
        log = storable(log)
        connection.execute(
            update(blueprints)
            .where(blueprints.c.position == row.position)
            .values(status=status, log=log, **lease)
        )
        details = {"source": row.status, "target": status, "log": log}
        if lease is not UNLEASED:
            details["owner"] = lease["lease_owner"]
        self.audit.append(
            connection,
            actor="tezzeret",
            event="blueprint.status",
            subject=row.blueprint_id,
            details=details,
        )

    def _replace_verdict(
        self,
        connection: Connection,
        row: Row[Any],
        report: UrabraskValidationReport,
        signature: str,
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
            update(kernels)
            .where(kernels.c.position == row.position)
            .values(**values, tag_set=_tag_set(connection, report.tags))
        )
        self.audit.append(
            connection,
            actor="urabrask",
            event="kernel.reported",
            subject=report.artifact_id,
            details={
                "status": report.status,
                "report": values["report_digest"],
                "replaces": row.report_digest,
                "key": self.trusted_key.hex(),
            },
        )


def _environment(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"a library without a folder needs {variable}")
    return value


def _add_evolutions(connection: Connection, blueprint_id: str, causes: list[str]) -> None:
    for report_digest in causes:
        if not _exists(connection, field_reports.c.report_digest, report_digest):
            raise ArtifactNotFoundError(f"the library holds no field report {report_digest}")
        connection.execute(
            insert(evolutions).values(blueprint_id=blueprint_id, report_digest=report_digest)
        )


def _tag_set(connection: Connection, tags: Collection[str]) -> int:
    """Return the position of the set of these tags, which is added if it is new."""
    distinct = sorted(set(tags))
    text = canonical_json(distinct).decode()
    known = select(tag_sets.c.position).where(tag_sets.c.tags == text)
    position: int | None = connection.execute(known).scalar()
    if position is not None:
        return position
    added = insert(tag_sets).values(tags=text).returning(tag_sets.c.position)
    position = int(connection.execute(added).scalar_one())
    for tag in distinct:
        connection.execute(insert(tag_set_members).values(tag=tag, tag_set=position))
    return position


def _exists(connection: Connection, column: Column[Any], key: str) -> bool:
    return connection.execute(select(column).where(column == key)).first() is not None


def _blueprint_row(connection: Connection, blueprint_id: str) -> Row[Any]:
    chosen = select(blueprints).where(blueprints.c.blueprint_id == checked_digest(blueprint_id))
    row = connection.execute(chosen).first()
    if row is None:
        raise ArtifactNotFoundError(f"the library holds no blueprint {blueprint_id}")
    return row


def _kernel_row(connection: Connection, artifact_id: str) -> Row[Any]:
    row = connection.execute(_KERNEL, {"sought_id": checked_digest(artifact_id)}).first()
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
        raise ConflictError(
            f"kernel {statement.artifact_id}: report {statement.report_digest} was replaced by a "
            "newer one and cannot validate it again"
        )
