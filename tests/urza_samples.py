"""Small blueprints, kernels and verdicts for the library's tests."""

import hashlib
from typing import Any

from esper.contracts import (
    Blueprint,
    Check,
    Design,
    FieldReport,
    KernelManifest,
    KernelStatement,
    KernelStatus,
    Measurement,
    Outcome,
    Pipeline,
    SiteSignature,
    UrabraskValidationReport,
)
from esper.urza import EvaluatorKey, Urza

UNKNOWN = "f" * 64
SITE = SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def graph(name: str) -> bytes:
    return b'{"graph": "%s"}' % name.encode()


def blueprint(name: str = "low_rank", **changes: Any) -> Blueprint:
    fields: dict[str, Any] = {
        "design": Design(name=name, builder="esper.blueprints:LowRank", hparams={"rank": 2}),
        "site": SITE,
        "dtype": "float32",
        "graph_digest": digest(graph(name)),
        "num_parameters": 48,
        "flops_per_sample": 96,
    }
    return Blueprint(**fields | changes)


def kernel_files(name: str = "low_rank") -> dict[str, bytes]:
    return {"graph.json": graph(name), "params.safetensors": b"weights of " + name.encode()}


def manifest(name: str = "low_rank", **changes: Any) -> KernelManifest:
    made_from = blueprint(name)
    fields: dict[str, Any] = {
        "blueprint_id": made_from.blueprint_id,
        "design": made_from.design,
        "pipeline": Pipeline.FAST,
        "site": made_from.site,
        "dtype": made_from.dtype,
        "device": "cpu",
        "torch_version": "2.13",
        "num_parameters": made_from.num_parameters,
        "flops_per_sample": made_from.flops_per_sample,
        "files": {file: digest(data) for file, data in kernel_files(name).items()},
    }
    return KernelManifest(**fields | changes)


def report(artifact_id: str, **changes: Any) -> UrabraskValidationReport:
    fields: dict[str, Any] = {
        "artifact_id": artifact_id,
        "status": KernelStatus.VALIDATED,
        "checks": (Check(name="finite", passed=True, reason="all outputs are finite"),),
        "measurement": measurement(12.5, 4096),
        "tags": ("small",),
        "risk_score": 0.25,
        "machine": "test",
        "torch_version": "2.13",
    }
    return UrabraskValidationReport(**fields | changes)


def measurement(latency_us: float, memory_bytes: int) -> Measurement:
    return Measurement(
        batch_size=32,
        forward_p50_us=latency_us,
        forward_p99_us=latency_us * 2,
        forward_backward_p50_us=latency_us * 3,
        eager_forward_p50_us=latency_us,
        memory_bytes=memory_bytes,
    )


def statement(verdict: UrabraskValidationReport) -> KernelStatement:
    return KernelStatement(
        artifact_id=verdict.artifact_id, status=verdict.status, report_digest=verdict.digest()
    )


def submit(urza: Urza, name: str = "low_rank") -> str:
    return urza.submit_blueprint(blueprint(name), graph(name))


def publish(urza: Urza, name: str = "low_rank", **changes: Any) -> str:
    submit(urza, name)
    return urza.publish_kernel(manifest(name, **changes), kernel_files(name))


def judge(
    urza: Urza, artifact_id: str, *, key: EvaluatorKey | None = None, **changes: Any
) -> UrabraskValidationReport:
    verdict = report(artifact_id, **changes)
    said = statement(verdict)
    urza.record_report(verdict, said, (key or urza.evaluator_key).sign(said))
    return verdict


def field_report(artifact_id: str, name: str = "low_rank", **changes: Any) -> FieldReport:
    fields: dict[str, Any] = {
        "seed_id": ("blocks.2.mlp", 0),
        "artifact_id": artifact_id,
        "blueprint_id": blueprint(name).blueprint_id,
        "outcome": Outcome.FOSSILIZED,
        "reason": "contribution 0.02 +- 0.004",
        "started_epoch": 3,
        "ended_epoch": 9,
        "num_parameters": 48,
    }
    return FieldReport(**fields | changes)


def audited(urza: Urza) -> list[str]:
    return [entry.event for entry in urza.audit.entries()]
