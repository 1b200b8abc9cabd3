"""What a library is to those who use it, wherever it lies: in a folder, or behind a server.

:class:`esper.urza.Urza` and :class:`esper.urza.client.UrzaClient` are two of them, and say more of
each method. All of them block; any thread may call them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

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
)
from esper.trust import TrustedKey
from esper.urza.audit import AuditEntry
from esper.urza.signing import EvaluatorKey


class Audit(Protocol):
    """The log of every change, to be read."""

    def head(self) -> str: ...

    def entries(self) -> list[AuditEntry]: ...

    def verify(self, *, expected_head: str | None = None) -> int: ...

    def export_jsonl(self, path: Path) -> str: ...


class Library(Protocol):
    """Blueprints, kernels, verdicts, and what became of them."""

    @property
    def audit(self) -> Audit: ...

    @property
    def evaluator_key(self) -> EvaluatorKey: ...

    @property
    def trusted_key(self) -> TrustedKey: ...

    def close(self) -> None: ...

    # ------------------------------------------------------------------ blueprints

    def submit_blueprint(
        self, blueprint: Blueprint, graph: bytes, *, evolved_from: Collection[str] = ()
    ) -> str: ...

    def blueprint(self, blueprint_id: str) -> Blueprint: ...

    def blueprint_status(self, blueprint_id: str) -> tuple[BlueprintStatus, str]: ...

    def blueprint_record(self, blueprint_id: str) -> BlueprintRecord: ...

    def graph(self, blueprint_id: str) -> bytes: ...

    def blueprints(self, status: BlueprintStatus | None = None) -> list[str]: ...

    def blueprint_records(self, status: BlueprintStatus | None = None) -> list[BlueprintRecord]: ...

    def set_interest(
        self, blueprint_id: str, role: Literal["tamiyo", "urabrask"], score: float
    ) -> None: ...

    # ------------------------------------------------------------------ the workers' work

    def set_blueprint_status(
        self, blueprint_id: str, status: BlueprintStatus, log: str = "", *, owner: str | None = None
    ) -> None: ...

    def claim_blueprint(
        self, owner: str, lease_s: float, *, blueprint_id: str | None = None
    ) -> str | None: ...

    def renew_lease(self, blueprint_id: str, owner: str, lease_s: float) -> None: ...

    def release_blueprint(self, blueprint_id: str, owner: str, log: str = "") -> None: ...

    def finish_compilation(self, compilation: Compilation) -> None: ...

    def was_tried(
        self, blueprint_id: str, pipeline: Pipeline, device: str, torch_version: str
    ) -> bool: ...

    def recompilation_prospects(
        self, device: str, torch_version: str, pipelines: Collection[Pipeline]
    ) -> list[RecompilationProspect]: ...

    def claim_kernel(
        self,
        owner: str,
        lease_s: float,
        *,
        device: str,
        torch_version: str,
        artifact_id: str | None = None,
    ) -> str | None: ...

    def renew_kernel_lease(self, artifact_id: str, owner: str, lease_s: float) -> None: ...

    def release_kernel(self, artifact_id: str, owner: str) -> None: ...

    def forge_status(
        self, owner: str | None = None, *, window_s: float = 3600.0
    ) -> ForgeStatus: ...

    # ------------------------------------------------------------------ kernels and verdicts

    def publish_kernel(self, manifest: KernelManifest, files: Mapping[str, bytes]) -> str: ...

    def kernel(self, artifact_id: str) -> KernelRecord: ...

    def kernels(self, status: KernelStatus | None = None) -> list[KernelRecord]: ...

    def fetch_kernel(self, artifact_id: str) -> KernelBundle: ...

    def query(self, query: KernelQuery) -> list[KernelRecord]: ...

    def archive(self, artifact_id: str) -> None: ...

    def record_report(
        self, report: UrabraskValidationReport, statement: KernelStatement, signature: str
    ) -> None: ...

    def report(self, artifact_id: str) -> UrabraskValidationReport: ...

    # ------------------------------------------------------------------ what became of them

    def record_field_report(self, report: FieldReport) -> None: ...

    def field_reports(self) -> list[FieldReport]: ...

    def record_lifecycle(self, event: LifecycleEvent) -> None: ...

    def lineage(self) -> dict[str, Any]: ...

    def verify(self) -> None: ...
