"""The pipelines that make an artifact of a blueprint. There is one so far, FAST."""

import hashlib

import torch

from esper.contracts import Blueprint, KernelManifest, Pipeline
from esper.errors import ArtifactError, BlueprintError
from esper.kasmina.kernel import GRAPH_FILE, PARAMS_FILE, Kernel
from esper.kasmina.program import Program
from esper.tezzeret.trace import instantiate, serialize_weights


def check_available(pipeline: Pipeline) -> None:
    """Raise ``ValueError`` for a pipeline that this version does not have."""
    if pipeline is not Pipeline.FAST:
        raise ValueError(f"pipeline {pipeline} is not available yet: this version has only FAST")


def torch_release() -> str:
    """Return the part of torch's version that a kernel depends on, as in "2.13"."""
    return ".".join(torch.__version__.split(".")[:2])


def package(
    blueprint: Blueprint, graph: bytes, device: str
) -> tuple[KernelManifest, dict[str, bytes]]:
    """FAST: the graph as it is, with the initial parameters drawn again from its init recipe.

    Runs the design's code, but not torch.export. Raises :class:`BlueprintError` if the design no
    longer has the weights that the graph names.
    """
    program = Program.from_json(graph)
    module = instantiate(blueprint.design, blueprint.site, blueprint.dtype, program.seed)
    files = {GRAPH_FILE: graph, PARAMS_FILE: serialize_weights(module)}
    manifest = KernelManifest(
        blueprint_id=blueprint.blueprint_id,
        design=blueprint.design,
        pipeline=Pipeline.FAST,
        site=blueprint.site,
        dtype=blueprint.dtype,
        device=device,
        torch_version=torch_release(),
        num_parameters=blueprint.num_parameters,
        flops_per_sample=blueprint.flops_per_sample,
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
    try:
        Kernel.build(manifest, files)
    except ArtifactError as error:
        raise BlueprintError(
            f"design {blueprint.design.name!r} has changed since it was submitted: {error}"
        ) from error
    return manifest, files
