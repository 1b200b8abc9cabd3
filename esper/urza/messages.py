"""What travels between Urza's server and its clients and is no contract by itself."""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from esper.contracts import (
    Blueprint,
    BlueprintStatus,
    Contract,
    FieldReport,
    HyperParameter,
    KernelManifest,
    KernelStatement,
    KernelStatus,
    Pipeline,
    Sha256,
    UrabraskValidationReport,
)


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


_BASE64 = r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

# Bytes that are base64 in JSON.
Octets = Annotated[
    bytes,
    BeforeValidator(_decoded),
    PlainSerializer(_encoded, when_used="json"),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "pattern": _BASE64}),
]


class BlueprintSubmission(Contract):
    blueprint: Blueprint
    graph: Octets  # canonical graph.json
    evolved_from: tuple[Sha256, ...] = ()  # digests of the field reports that it answers


class Interest(Contract):
    score: float


class KernelUpload(Contract):
    manifest: KernelManifest
    files: dict[str, Octets]


class SignedReport(Contract):
    report: UrabraskValidationReport
    statement: KernelStatement
    signature: str  # hexadecimal Ed25519


class StatusChange(Contract):
    status: BlueprintStatus
    log: str = ""
    owner: str | None = None


class Claim(Contract):
    owner: str
    lease_s: float
    blueprint_id: Sha256 | None = None


class Claimed(Contract):
    blueprint_id: Sha256 | None  # None: nothing waits


class KernelClaim(Contract):
    owner: str
    lease_s: float
    device: str  # "cpu" or "cuda"
    torch_version: str  # "2.13"
    artifact_id: Sha256 | None = None


class ClaimedKernel(Contract):
    artifact_id: Sha256 | None  # None: none waits that can be judged there


class Renewal(Contract):
    owner: str
    lease_s: float


class Release(Contract):
    owner: str
    log: str = ""


class KernelRelease(Contract):
    owner: str


class Tried(Contract):
    tried: bool


class AuditHead(Contract):
    head: Sha256  # hash of the newest row


class AuditLength(Contract):
    rows: int


class BlueprintNode(Contract):
    id: Sha256
    kind: Literal["blueprint"]
    design: str
    hparams: dict[str, HyperParameter]
    status: BlueprintStatus
    parents: tuple[Sha256, ...]


class KernelNode(Contract):
    id: Sha256
    kind: Literal["kernel"]
    pipeline: Pipeline
    status: KernelStatus
    archived: bool
    files: dict[str, Sha256]
    tags: tuple[str, ...]


class AdaptationNode(Contract):
    id: Sha256
    kind: Literal["adaptation"]
    field_report: FieldReport


class LineageEdge(Contract):
    source: Sha256
    target: Sha256
    kind: Literal["parent", "compiled", "recompiled", "adapted", "evolved"]


class Lineage(Contract):
    """See :func:`esper.urza.lineage.lineage_graph`."""

    nodes: tuple[BlueprintNode | KernelNode | AdaptationNode, ...]
    edges: tuple[LineageEdge, ...]
