"""Where every kernel came from and what became of it, as one graph."""

import json
from collections.abc import Sequence
from typing import Any

from esper.contracts import Blueprint, BlueprintStatus, FieldReport, KernelRecord


def lineage_graph(
    blueprints: Sequence[tuple[Blueprint, BlueprintStatus]],
    kernels: Sequence[KernelRecord],
    adaptations: Sequence[FieldReport],
) -> dict[str, Any]:
    """Return ``{"nodes": [...], "edges": [...]}``, of JSON values only, without cycles.

    Edges run from cause to result: parent blueprint to blueprint, blueprint to kernel, kernel to
    adaptation. An adaptation's id is its field report's digest.
    """
    nodes = [
        *(_blueprint_node(blueprint, status) for blueprint, status in blueprints),
        *(_kernel_node(record) for record in kernels),
        *(_adaptation_node(report) for report in adaptations),
    ]
    edges = [
        *(
            _edge(parent, blueprint.blueprint_id, "parent")
            for blueprint, _ in blueprints
            for parent in blueprint.parents
        ),
        *(_edge(k.manifest.blueprint_id, k.artifact_id, "compiled") for k in kernels),
        *(_edge(report.artifact_id, report.digest(), "adapted") for report in adaptations),
    ]
    return {"nodes": nodes, "edges": edges}


def _blueprint_node(blueprint: Blueprint, status: BlueprintStatus) -> dict[str, Any]:
    return {
        "id": blueprint.blueprint_id,
        "kind": "blueprint",
        "design": blueprint.design.name,
        "hparams": blueprint.design.hparams,
        "status": status.value,
        "parents": list(blueprint.parents),
    }


def _kernel_node(record: KernelRecord) -> dict[str, Any]:
    return {
        "id": record.artifact_id,
        "kind": "kernel",
        "pipeline": record.manifest.pipeline.value,
        "status": record.status.value,
        "files": record.manifest.files,
        "tags": list(record.tags),
    }


def _adaptation_node(report: FieldReport) -> dict[str, Any]:
    return {
        "id": report.digest(),
        "kind": "adaptation",
        "field_report": json.loads(report.canonical()),  # also where a loss is not finite
    }


def _edge(source: str, target: str, kind: str) -> dict[str, str]:
    return {"source": source, "target": target, "kind": kind}
