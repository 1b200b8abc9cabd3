"""Where every kernel came from and what became of it, as one graph."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from esper.contracts import Blueprint, BlueprintStatus, FieldReport, KernelRecord


def lineage_graph(
    blueprints: Sequence[tuple[Blueprint, BlueprintStatus]],
    kernels: Sequence[KernelRecord],
    adaptations: Sequence[FieldReport],
    evolutions: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return ``{"nodes": [...], "edges": [...]}``, of JSON values only.

    Edges run from cause to result: parent blueprint to blueprint, blueprint to kernel, kernel to
    the next one that was compiled of the same blueprint for the same dtype and device, kernel to
    adaptation, adaptation to the blueprint that evolved from it. A cause was stored before its
    result, so there are no cycles. An adaptation's id is its field report's digest.

    Args:
        blueprints: with their statuses.
        kernels: oldest first.
        adaptations: as reported.
        evolutions: ``(report digest, blueprint id)``.
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
        *(_edge(old, new, "recompiled") for old, new in _recompilations(kernels)),
        *(_edge(report.artifact_id, report.digest(), "adapted") for report in adaptations),
        *(_edge(adaptation, blueprint_id, "evolved") for adaptation, blueprint_id in evolutions),
    ]
    return {"nodes": nodes, "edges": edges}


def _recompilations(kernels: Sequence[KernelRecord]) -> Iterator[tuple[str, str]]:
    made: dict[tuple[str, str, str], list[str]] = {}
    for kernel in kernels:
        manifest = kernel.manifest
        key = (manifest.blueprint_id, manifest.dtype, manifest.device)
        made.setdefault(key, []).append(kernel.artifact_id)
    for artifact_ids in made.values():
        yield from pairwise(artifact_ids)


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
        "archived": record.archived,
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
