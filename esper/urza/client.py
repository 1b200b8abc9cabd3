"""A library behind a server, for trainers, forges and evaluators on other machines.

It answers as :class:`esper.urza.Urza` does and raises the same exceptions. What comes over the
network is checked against the digests that name it, as what comes from a disk is.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter

from esper.contracts import (
    Blueprint,
    BlueprintRecord,
    BlueprintStatus,
    BlueprintSubmitted,
    Compilation,
    Contract,
    FieldReport,
    ForgeStatus,
    KernelBundle,
    KernelManifest,
    KernelQuery,
    KernelReady,
    KernelRecord,
    KernelStatement,
    KernelStatus,
    LifecycleEvent,
    Pipeline,
    RecompilationProspect,
    UrabraskValidationReport,
    canonical_json,
)
from esper.errors import ArtifactIntegrityError, LibraryError
from esper.trust import TrustedKey, verify_files
from esper.urza.audit import GENESIS, AuditEntry
from esper.urza.blobs import checked_digest
from esper.urza.exchange import Exchange, Params, without_password
from esper.urza.keys import Keys
from esper.urza.messages import (
    AuditHead,
    AuditLength,
    BlueprintSubmission,
    Claim,
    Claimed,
    ClaimedKernel,
    Interest,
    KernelClaim,
    KernelRelease,
    KernelUpload,
    Release,
    Renewal,
    SignedReport,
    StatusChange,
    Tried,
)
from esper.urza.query import check_fit
from esper.urza.rows import storable
from esper.urza.signing import EvaluatorKey

T = TypeVar("T")

_API, _INTERNAL = "/api/v1", "/internal/v1"
_AUDIT_ENTRIES = TypeAdapter(list[AuditEntry])
_BLUEPRINT_RECORDS = TypeAdapter(list[BlueprintRecord])
_FIELD_REPORTS = TypeAdapter(list[FieldReport])
_KERNEL_RECORDS = TypeAdapter(list[KernelRecord])
_PROSPECTS = TypeAdapter(list[RecompilationProspect])


class UrzaClient:
    """A library at ``url``. Every method blocks on the network, and any thread may call it.

    Requests that may be repeated are sent again while the server is away: all but those that end
    a lease (:meth:`set_blueprint_status`, :meth:`finish_compilation`, :meth:`release_blueprint`,
    :meth:`release_kernel`). A repeated :meth:`record_lifecycle` may leave two audit entries, a
    repeated claim a lease that nobody uses until it runs out. LibraryError if the server stays
    away.

    Args:
        url: of the server, ``http://host:8420`` or ``https://...``.
        token: the bearer token (``URZA_API_TOKEN``).
        key_path: PEM file of the evaluator's private key (``URZA_KEY``), for who signs verdicts.
        trusted_key: the evaluator's public key or the path of its PEM file
            (``URZA_TRUSTED_KEY``). The server is not asked for it.
        timeout_s: for which one answer is waited for.
        patience_s: for which a server that is away is asked again.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        key_path: Path | None = None,
        trusted_key: TrustedKey | Path | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 30.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"a library's server has an http:// or https:// URL, got {without_password(url)!r}"
            )
        self._keys = Keys(key_path, trusted_key)
        self._exchange = Exchange(
            url,
            token or os.environ.get("URZA_API_TOKEN"),
            timeout_s=timeout_s,
            patience_s=patience_s,
        )
        self.audit = RemoteAudit(self)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="esper-urza-client", daemon=True
        )
        self._thread.start()

    @property
    def evaluator_key(self) -> EvaluatorKey:
        """The key that verdicts are signed with, made when it is first asked for."""
        return self._keys.evaluator_key

    @property
    def trusted_key(self) -> TrustedKey:
        """The public key that verdicts must be signed for; LibraryError if none was given."""
        return self._keys.trusted_key

    def reach(self, *, patience_s: float) -> None:
        """Raise LibraryError, TokenError among them, if the server does not answer us until then.

        The message has its URL.
        """
        try:
            self._run(self._exchange.ask("GET", f"{_API}/audit/head", patience_s=patience_s))
        except LibraryError as error:
            where = f"the library's server at {self._exchange.shown_url} cannot be used"
            raise type(error)(f"{where}: {error}") from error

    def close(self) -> None:
        """End the connections. What other threads are asking fails."""
        if self._loop.is_closed():
            return
        self._run(self._dismiss())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ blueprints

    def submit_blueprint(
        self, blueprint: Blueprint, graph: bytes, *, evolved_from: Collection[str] = ()
    ) -> str:
        submission = BlueprintSubmission(
            blueprint=blueprint,
            graph=graph,
            evolved_from=tuple(checked_digest(digest) for digest in evolved_from),
        )
        answer = self.ask("POST", f"{_API}/blueprints", submission)
        return read(BlueprintSubmitted.model_validate_json, answer).blueprint_id

    def blueprint(self, blueprint_id: str) -> Blueprint:
        return self.blueprint_record(blueprint_id).blueprint

    def blueprint_status(self, blueprint_id: str) -> tuple[BlueprintStatus, str]:
        record = self.blueprint_record(blueprint_id)
        return record.status, record.log

    def blueprint_record(self, blueprint_id: str) -> BlueprintRecord:
        answer = self.ask("GET", f"{_API}/blueprints/{checked_digest(blueprint_id)}")
        record = read(BlueprintRecord.model_validate_json, answer)
        _check_digest(f"blueprint {blueprint_id}", blueprint_id, record.blueprint.digest())
        return record

    def graph(self, blueprint_id: str) -> bytes:
        expected = self.blueprint(blueprint_id).graph_digest
        data = self.ask("GET", f"{_API}/blueprints/{blueprint_id}/graph")
        _check_digest(f"graph {expected}", expected, hashlib.sha256(data).hexdigest())
        return data

    def blueprints(self, status: BlueprintStatus | None = None) -> list[str]:
        return [record.blueprint_id for record in self.blueprint_records(status)]

    def blueprint_records(self, status: BlueprintStatus | None = None) -> list[BlueprintRecord]:
        answer = self.ask("GET", f"{_API}/blueprints", params=_filter(status))
        records = read(_BLUEPRINT_RECORDS.validate_json, answer)
        for record in records:
            name = record.blueprint_id
            _check_digest(f"blueprint {name}", name, record.blueprint.digest())
        return records

    def set_interest(
        self, blueprint_id: str, role: Literal["tamiyo", "urabrask"], score: float
    ) -> None:
        path = f"{_API}/blueprints/{checked_digest(blueprint_id)}/interest/{role}"
        self.ask("PUT", path, Interest(score=score))

    # ------------------------------------------------------------------ the workers' work

    def set_blueprint_status(
        self, blueprint_id: str, status: BlueprintStatus, log: str = "", *, owner: str | None = None
    ) -> None:
        path = f"{_INTERNAL}/blueprints/{checked_digest(blueprint_id)}/status"
        change = StatusChange(status=status, log=storable(log), owner=owner)
        self.ask("POST", path, change, repeatable=False)

    def claim_blueprint(
        self, owner: str, lease_s: float, *, blueprint_id: str | None = None
    ) -> str | None:
        wanted = None if blueprint_id is None else checked_digest(blueprint_id)
        claim = Claim(owner=storable(owner), lease_s=lease_s, blueprint_id=wanted)
        answer = self.ask("POST", f"{_INTERNAL}/leases", claim)
        return read(Claimed.model_validate_json, answer).blueprint_id

    def renew_lease(self, blueprint_id: str, owner: str, lease_s: float) -> None:
        path = f"{_INTERNAL}/leases/{checked_digest(blueprint_id)}"
        self.ask("PUT", path, Renewal(owner=owner, lease_s=lease_s))

    def release_blueprint(self, blueprint_id: str, owner: str, log: str = "") -> None:
        path = f"{_INTERNAL}/leases/{checked_digest(blueprint_id)}/release"
        self.ask("POST", path, Release(owner=owner, log=storable(log)), repeatable=False)

    def finish_compilation(self, compilation: Compilation) -> None:
        told = compilation.model_copy(update={"log": storable(compilation.log)})
        self.ask("POST", f"{_INTERNAL}/compilations", told, repeatable=False)

    def was_tried(
        self, blueprint_id: str, pipeline: Pipeline, device: str, torch_version: str
    ) -> bool:
        answer = self.ask(
            "GET",
            f"{_API}/blueprints/{checked_digest(blueprint_id)}/tried",
            params={"pipeline": pipeline, "device": device, "torch_version": torch_version},
        )
        return read(Tried.model_validate_json, answer).tried

    def recompilation_prospects(
        self, device: str, torch_version: str, pipelines: Collection[Pipeline]
    ) -> list[RecompilationProspect]:
        params: Params = {
            "device": device,
            "torch_version": torch_version,
            "pipeline": list(pipelines),
        }
        answer = self.ask("GET", f"{_API}/forge/prospects", params=params)
        return read(_PROSPECTS.validate_json, answer)

    def claim_kernel(
        self,
        owner: str,
        lease_s: float,
        *,
        device: str,
        torch_version: str,
        artifact_id: str | None = None,
    ) -> str | None:
        claim = KernelClaim(
            owner=storable(owner),
            lease_s=lease_s,
            device=device,
            torch_version=torch_version,
            artifact_id=None if artifact_id is None else checked_digest(artifact_id),
        )
        answer = self.ask("POST", f"{_INTERNAL}/kernel-leases", claim)
        return read(ClaimedKernel.model_validate_json, answer).artifact_id

    def renew_kernel_lease(self, artifact_id: str, owner: str, lease_s: float) -> None:
        path = f"{_INTERNAL}/kernel-leases/{checked_digest(artifact_id)}"
        self.ask("PUT", path, Renewal(owner=owner, lease_s=lease_s))

    def release_kernel(self, artifact_id: str, owner: str) -> None:
        path = f"{_INTERNAL}/kernel-leases/{checked_digest(artifact_id)}/release"
        self.ask("POST", path, KernelRelease(owner=owner), repeatable=False)

    def forge_status(self, owner: str | None = None, *, window_s: float = 3600.0) -> ForgeStatus:
        params = {"window_s": str(window_s)} | ({} if owner is None else {"owner": owner})
        answer = self.ask("GET", f"{_API}/forge/status", params=params)
        return read(ForgeStatus.model_validate_json, answer)

    # ------------------------------------------------------------------ kernels and verdicts

    def publish_kernel(self, manifest: KernelManifest, files: Mapping[str, bytes]) -> str:
        upload = KernelUpload(manifest=manifest, files=dict(files))
        answer = self.ask("POST", f"{_INTERNAL}/kernels", upload)
        return read(KernelReady.model_validate_json, answer).artifact_id

    def kernel(self, artifact_id: str) -> KernelRecord:
        return self._run(self._kernel(artifact_id))

    def kernels(self, status: KernelStatus | None = None) -> list[KernelRecord]:
        return _kernel_records(self.ask("GET", f"{_API}/kernels", params=_filter(status)))

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        return self._run(self._fetch_kernel(artifact_id))

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        records = _kernel_records(self.ask("POST", f"{_API}/kernels/query", query))
        for record in records:
            check_fit(record, query)
        return records

    def archive(self, artifact_id: str) -> None:
        self.ask("POST", f"{_API}/kernels/{checked_digest(artifact_id)}/archive")

    def record_report(
        self, report: UrabraskValidationReport, statement: KernelStatement, signature: str
    ) -> None:
        signed = SignedReport(report=report, statement=statement, signature=signature)
        self.ask("POST", f"{_INTERNAL}/kernels/{report.artifact_id}/report", signed)

    def report(self, artifact_id: str) -> UrabraskValidationReport:
        answer = self.ask("GET", f"{_API}/kernels/{checked_digest(artifact_id)}/report")
        report = read(UrabraskValidationReport.model_validate_json, answer)
        statement = self.kernel(artifact_id).statement
        if statement is None or statement.report_digest != report.digest():
            raise ArtifactIntegrityError(
                f"kernel {artifact_id}: its report was altered, or replaced while it was read"
            )
        return report

    # ------------------------------------------------------------------ what became of them

    def record_field_report(self, report: FieldReport) -> None:
        self.ask("POST", f"{_API}/field-reports", report)

    def field_reports(self) -> list[FieldReport]:
        return read(_FIELD_REPORTS.validate_json, self.ask("GET", f"{_API}/field-reports"))

    def record_lifecycle(self, event: LifecycleEvent) -> None:
        self.ask("POST", f"{_API}/lifecycle-events", event)

    def lineage(self) -> dict[str, Any]:
        """Return blueprints, kernels and adaptations as a graph; see ``lineage_graph``."""
        graph: dict[str, Any] = read(json.loads, self.ask("GET", f"{_API}/lineage"))
        return graph

    def verify(self) -> None:
        """Have the server check every stored byte, row and link."""
        self.ask("GET", f"{_API}/verified")

    # ------------------------------------------------------------------ asking

    def ask(
        self,
        method: str,
        path: str,
        contract: Contract | None = None,
        *,
        params: Params | None = None,
        repeatable: bool = True,
    ) -> bytes:
        """Ask once and for all; see :meth:`Exchange.ask`."""
        body = None if contract is None else contract.canonical()
        return self._run(
            self._exchange.ask(method, path, params=params, body=body, repeatable=repeatable)
        )

    async def _kernel(self, artifact_id: str) -> KernelRecord:
        answer = await self._exchange.ask("GET", f"{_API}/kernels/{checked_digest(artifact_id)}")
        record = read(KernelRecord.model_validate_json, answer)
        _check_digest(f"kernel {artifact_id}", artifact_id, record.manifest.artifact_id)
        return record

    async def _fetch_kernel(self, artifact_id: str) -> KernelBundle:
        record = await self._kernel(artifact_id)
        path = f"{_API}/kernels/{artifact_id}/files"
        names = list(record.manifest.files)
        contents = await asyncio.gather(
            *(self._exchange.ask("GET", f"{path}/{quote(name, safe='')}") for name in names)
        )
        files = dict(zip(names, contents, strict=True))
        verify_files(record.manifest, files)
        return KernelBundle(record=record, files=files)

    def _run(self, answer: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            answer.close()
            raise LibraryError("the library's client was closed")
        try:
            return asyncio.run_coroutine_threadsafe(answer, self._loop).result()
        except concurrent.futures.CancelledError as error:
            raise LibraryError("the library's client was closed") from error

    async def _dismiss(self) -> None:
        asking = asyncio.all_tasks() - {asyncio.current_task()}
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await self._exchange.close()


class RemoteAudit:
    """The audit log of the library behind ``client``; the server walks its chain."""

    def __init__(self, client: UrzaClient) -> None:
        self._client = client

    def head(self) -> str:
        return read(
            AuditHead.model_validate_json, self._client.ask("GET", f"{_API}/audit/head")
        ).head

    def entries(self) -> list[AuditEntry]:
        return read(_AUDIT_ENTRIES.validate_json, self._client.ask("GET", f"{_API}/audit"))

    def verify(self, *, expected_head: str | None = None) -> int:
        params = {} if expected_head is None else {"head": checked_digest(expected_head)}
        answer = self._client.ask("GET", f"{_API}/audit/verified", params=params)
        return read(AuditLength.model_validate_json, answer).rows

    def export_jsonl(self, path: Path) -> str:
        """Write one canonical JSON object a line, hash included, and return the head."""
        head = GENESIS
        with path.open("wb") as file:
            for entry in self.entries():
                head = entry.digest()
                file.write(canonical_json(entry.model_dump(mode="json") | {"hash": head}) + b"\n")
        return head


def read(parse: Callable[[bytes], T], answer: bytes) -> T:
    try:
        return parse(answer)
    except ValueError as error:
        raise LibraryError(
            f"the library's server gave an answer that has no sense: {error}"
        ) from error


def _kernel_records(answer: bytes) -> list[KernelRecord]:
    records = read(_KERNEL_RECORDS.validate_json, answer)
    for record in records:
        name = record.artifact_id
        _check_digest(f"kernel {name}", name, record.manifest.artifact_id)
    return records


def _check_digest(what: str, expected: str, found: str) -> None:
    if found != expected:
        raise ArtifactIntegrityError(f"{what}: it was altered, what came has digest {found}")


def _filter(status: BlueprintStatus | KernelStatus | None) -> dict[str, str]:
    return {} if status is None else {"status": status.value}
