"""The routes of Urza's server: each is one call of the library that it serves.

Answers are canonical JSON, so that a contract has the same digest here and there; values that are
not finite travel as strings, which contracts read back.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, Security
from fastapi.security import HTTPBearer

from esper.contracts import (
    BlueprintRecord,
    BlueprintStatus,
    BlueprintSubmitted,
    Compilation,
    Contract,
    FieldReport,
    ForgeStatus,
    KernelQuery,
    KernelReady,
    KernelRecord,
    KernelStatus,
    LifecycleEvent,
    Pipeline,
    RecompilationProspect,
    Sha256,
    UrabraskValidationReport,
    canonical_json,
)
from esper.errors import RoleError
from esper.urza.access import Role
from esper.urza.audit import AuditEntry
from esper.urza.library import Urza
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
    Lineage,
    Release,
    Renewal,
    SignedReport,
    StatusChange,
    Tried,
)

API, INTERNAL = "/api/v1", "/internal/v1"
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}
_WANTED_BY = {"tamiyo": Role.RESEARCHER, "urabrask": Role.EVALUATOR}

# The gate has settled whose request it is; this has the API's description say so.
_bearer = HTTPBearer(auto_error=False, description="see `esper urza token`")


def make_router(*, by_token: bool) -> APIRouter:
    """Return a router whose routes say, if so, that they ask for a token."""
    return APIRouter(dependencies=[Security(_bearer)] if by_token else [])


def library_routes(library: Urza, *, by_token: bool) -> APIRouter:
    router = make_router(by_token=by_token)
    for add in (
        _add_blueprints,
        _add_kernels,
        _add_status,
        _add_forge,
        _add_evaluator,
        _add_history,
    ):
        add(router, library)
    return router


def _add_blueprints(router: APIRouter, library: Urza) -> None:
    path = f"{API}/blueprints"

    @router.post(
        path,
        status_code=201,
        response_model=BlueprintSubmitted,
        dependencies=allowed(Role.RESEARCHER, Role.FORGE),
    )
    def submit_blueprint(submission: BlueprintSubmission) -> Response:
        """Store a blueprint and its graph. Again, it changes nothing."""
        blueprint_id = library.submit_blueprint(
            submission.blueprint, submission.graph, evolved_from=submission.evolved_from
        )
        return as_json(BlueprintSubmitted(blueprint_id=blueprint_id), 201)

    @router.get(path, response_model=list[BlueprintRecord])
    def list_blueprints(status: BlueprintStatus | None = None) -> Response:
        """All blueprints, oldest first."""
        return _json_list(library.blueprint_records(status))

    @router.get(f"{path}/{{blueprint_id}}", response_model=BlueprintRecord)
    def get_blueprint(blueprint_id: Sha256) -> Response:
        """A blueprint, its status, and who compiles it."""
        return as_json(library.blueprint_record(blueprint_id))

    @router.get(f"{path}/{{blueprint_id}}/graph", response_class=Response, responses=_BYTES)
    def get_graph(blueprint_id: Sha256) -> Response:
        """The blueprint's canonical graph, whose SHA-256 it names."""
        return _bytes(library.graph(blueprint_id))

    @router.put(f"{path}/{{blueprint_id}}/interest/{{role}}", status_code=204)
    def set_interest(
        blueprint_id: Sha256,
        role: Literal["tamiyo", "urabrask"],
        interest: Interest,
        request: Request,
    ) -> None:
        """Say how much the controller or the evaluator wants a blueprint compiled."""
        _check_roles(request, _WANTED_BY[role])
        library.set_interest(blueprint_id, role, interest.score)


def _add_kernels(router: APIRouter, library: Urza) -> None:
    path = f"{API}/kernels"

    @router.get(path, response_model=list[KernelRecord])
    def list_kernels(status: KernelStatus | None = None) -> Response:
        """All kernels, oldest first."""
        return _json_list(library.kernels(status))

    @router.post(f"{path}/query", response_model=list[KernelRecord])
    def query_kernels(query: KernelQuery) -> Response:
        """The VALIDATED kernels that fit, best first."""
        return _json_list(library.query(query))

    @router.get(f"{path}/{{artifact_id}}", response_model=KernelRecord)
    def get_kernel(artifact_id: Sha256) -> Response:
        """A kernel's manifest, and its newest verdict with the evaluator's signature."""
        return as_json(library.kernel(artifact_id))

    @router.get(f"{path}/{{artifact_id}}/files/{{name}}", response_class=Response, responses=_BYTES)
    def get_kernel_file(artifact_id: Sha256, name: str) -> Response:
        """One of the files whose SHA-256 the manifest names."""
        return _bytes(library.kernel_file(artifact_id, name))

    @router.get(f"{path}/{{artifact_id}}/report", response_model=UrabraskValidationReport)
    def get_report(artifact_id: Sha256) -> Response:
        """The report that the newest verdict is about."""
        return as_json(library.report(artifact_id))

    @router.post(
        f"{path}/{{artifact_id}}/archive", status_code=204, dependencies=allowed(Role.OPERATOR)
    )
    def archive_kernel(artifact_id: Sha256) -> None:
        """Let queries no longer find a kernel."""
        library.archive(artifact_id)


def _add_status(router: APIRouter, library: Urza) -> None:
    @router.get(f"{API}/forge/status", response_model=ForgeStatus)
    def get_forge_status(owner: str | None = None, window_s: float = 3600.0) -> Response:
        """What waits and who has it, and what was done lately, by one forge or by all."""
        return as_json(library.forge_status(owner, window_s=window_s))

    @router.get(f"{API}/forge/prospects", response_model=list[RecompilationProspect])
    def list_prospects(
        device: str, torch_version: str, pipeline: Annotated[tuple[Pipeline, ...], Query()] = ()
    ) -> Response:
        """What one of the pipelines might make anew, the most interesting first."""
        return _json_list(library.recompilation_prospects(device, torch_version, pipeline))

    @router.get(f"{API}/blueprints/{{blueprint_id}}/tried", response_model=Tried)
    def get_tried(
        blueprint_id: Sha256, pipeline: Pipeline, device: str, torch_version: str
    ) -> Response:
        """Whether a forge has tried to make such a kernel, with success or without."""
        return as_json(
            Tried(tried=library.was_tried(blueprint_id, pipeline, device, torch_version))
        )


def _add_forge(router: APIRouter, library: Urza) -> None:
    forge = allowed(Role.FORGE)

    @router.post(f"{INTERNAL}/leases", response_model=Claimed, dependencies=forge)
    def claim_blueprint(claim: Claim) -> Response:
        """Lease what is most worth compiling, or the blueprint that is named."""
        claimed = library.claim_blueprint(
            claim.owner, claim.lease_s, blueprint_id=claim.blueprint_id
        )
        return as_json(Claimed(blueprint_id=claimed))

    @router.put(f"{INTERNAL}/leases/{{blueprint_id}}", status_code=204, dependencies=forge)
    def renew_lease(blueprint_id: Sha256, renewal: Renewal) -> None:
        """Let a lease end later."""
        library.renew_lease(blueprint_id, renewal.owner, renewal.lease_s)

    @router.post(f"{INTERNAL}/leases/{{blueprint_id}}/release", status_code=204, dependencies=forge)
    def release_blueprint(blueprint_id: Sha256, release: Release) -> None:
        """Give a leased blueprint back as it was."""
        library.release_blueprint(blueprint_id, release.owner, release.log)

    @router.post(
        f"{INTERNAL}/blueprints/{{blueprint_id}}/status", status_code=204, dependencies=forge
    )
    def set_blueprint_status(blueprint_id: Sha256, change: StatusChange) -> None:
        """Take a legal edge."""
        library.set_blueprint_status(blueprint_id, change.status, change.log, owner=change.owner)

    @router.post(f"{INTERNAL}/compilations", status_code=204, dependencies=forge)
    def finish_compilation(compilation: Compilation) -> None:
        """Settle a leased blueprint by what came of compiling it."""
        library.finish_compilation(compilation)

    @router.post(
        f"{INTERNAL}/kernels", status_code=201, response_model=KernelReady, dependencies=forge
    )
    def publish_kernel(upload: KernelUpload) -> Response:
        """Store an artifact, PENDING_BENCHMARKING. Again, it changes nothing."""
        return as_json(
            KernelReady(artifact_id=library.publish_kernel(upload.manifest, upload.files)), 201
        )


def _add_evaluator(router: APIRouter, library: Urza) -> None:
    evaluator = allowed(Role.EVALUATOR)
    path = f"{INTERNAL}/kernel-leases"

    @router.post(path, response_model=ClaimedKernel, dependencies=evaluator)
    def claim_kernel(claim: KernelClaim) -> Response:
        """Lease the oldest kernel that waits for a verdict, or the one that is named."""
        claimed = library.claim_kernel(
            claim.owner,
            claim.lease_s,
            device=claim.device,
            torch_version=claim.torch_version,
            artifact_id=claim.artifact_id,
        )
        return as_json(ClaimedKernel(artifact_id=claimed))

    @router.put(f"{path}/{{artifact_id}}", status_code=204, dependencies=evaluator)
    def renew_kernel_lease(artifact_id: Sha256, renewal: Renewal) -> None:
        """Let a lease end later."""
        library.renew_kernel_lease(artifact_id, renewal.owner, renewal.lease_s)

    @router.post(f"{path}/{{artifact_id}}/release", status_code=204, dependencies=evaluator)
    def release_kernel(artifact_id: Sha256, release: KernelRelease) -> None:
        """Let others claim a kernel."""
        library.release_kernel(artifact_id, release.owner)

    @router.post(
        f"{INTERNAL}/kernels/{{artifact_id}}/report", status_code=204, dependencies=evaluator
    )
    def record_report(artifact_id: Sha256, signed: SignedReport) -> None:
        """Make a verdict, which the trusted evaluator has signed, the kernel's status."""
        if signed.report.artifact_id != artifact_id:
            raise ValueError(
                f"a report on kernel {signed.report.artifact_id} was sent for {artifact_id}"
            )
        library.record_report(signed.report, signed.statement, signed.signature)


def _add_history(router: APIRouter, library: Urza) -> None:
    researcher = allowed(Role.RESEARCHER)
    operator = allowed(Role.OPERATOR)

    @router.post(f"{API}/field-reports", status_code=204, dependencies=researcher)
    def record_field_report(report: FieldReport) -> None:
        """Keep how an adaptation ended. Again, it changes nothing."""
        library.record_field_report(report)

    @router.get(f"{API}/field-reports", response_model=list[FieldReport])
    def list_field_reports() -> Response:
        """How adaptations ended, oldest first."""
        return _json_list(library.field_reports())

    @router.post(f"{API}/lifecycle-events", status_code=204, dependencies=researcher)
    def record_lifecycle(event: LifecycleEvent) -> None:
        """Write an edge that a seed took to the audit log."""
        library.record_lifecycle(event)

    @router.get(f"{API}/lineage", response_model=Lineage)
    def get_lineage() -> Response:
        """Where every kernel came from and what became of it."""
        return Response(canonical_json(library.lineage()), media_type="application/json")

    @router.get(f"{API}/audit", response_model=list[AuditEntry])
    def list_audit_entries() -> Response:
        """The audit log, oldest row first, unverified."""
        return _json_list(library.audit.entries())

    @router.get(f"{API}/audit/head", response_model=AuditHead)
    def get_audit_head() -> Response:
        """Where the audit log ends."""
        return as_json(AuditHead(head=library.audit.head()))

    @router.get(f"{API}/audit/verified", response_model=AuditLength, dependencies=operator)
    def verify_audit(head: Sha256 | None = None) -> Response:
        """Walk the chain, which must hold, and contain ``head``."""
        return as_json(AuditLength(rows=library.audit.verify(expected_head=head)))

    @router.get(f"{API}/verified", status_code=204, dependencies=operator)
    def verify_library() -> None:
        """Check every stored byte, row and link."""
        library.verify()


def allowed(*roles: Role) -> list[Any]:
    """Dependencies that refuse a token which has none of the roles."""

    def check(request: Request) -> None:
        _check_roles(request, *roles)

    return [Depends(check)]


def _check_roles(request: Request, *roles: Role) -> None:
    held: frozenset[Role] = request.state.roles
    if held.isdisjoint({Role.OPERATOR, *roles}):
        raise RoleError(
            f"this takes the role {' or '.join(roles)}, the token has {', '.join(sorted(held))}"
        )


def as_json(contract: Contract, status: int = 200) -> Response:
    return Response(contract.canonical(), status, media_type="application/json")


def _json_list(contracts: Sequence[Contract]) -> Response:
    body = b"[%s]" % b",".join(contract.canonical() for contract in contracts)
    return Response(body, media_type="application/json")


def _bytes(data: bytes) -> Response:
    return Response(data, media_type="application/octet-stream")
