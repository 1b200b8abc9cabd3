"""The pipelines that make an artifact of a blueprint.

FAST packs the graph as it is. STANDARD and AGGRESSIVE add machine code for training steps, by one
way to compile or the best of several, and only if it is faster: else they deliver what a simpler
pipeline delivers, and say so.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from esper.contracts import Blueprint, KernelManifest, Pipeline
from esper.errors import ArtifactError, BlueprintError
from esper.kasmina.kernel import GRAPH_FILE, PARAMS_FILE, Kernel
from esper.kasmina.program import Program
from esper.tezzeret.trace import instantiate, serialize_weights

_COMPILER = "g++"


@dataclass(frozen=True)
class Delivery:
    """An artifact; ``remark`` says why it is of a simpler pipeline than was asked for."""

    manifest: KernelManifest
    files: dict[str, bytes]
    remark: str = ""


def check_available(pipeline: Pipeline) -> None:
    """Raise ``ValueError`` for a pipeline that this machine cannot run."""
    if pipeline is not Pipeline.FAST and shutil.which(_COMPILER) is None:
        raise ValueError(f"pipeline {pipeline} needs the compiler {_COMPILER}, which is not there")


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
        files=_digests(files),
    )
    try:
        Kernel.build(manifest, files)
    except ArtifactError as error:
        raise BlueprintError(
            f"design {blueprint.design.name!r} has changed since it was submitted: {error}"
        ) from error
    return manifest, files


def deliver(blueprint: Blueprint, graph: bytes, device: str, pipeline: Pipeline) -> Delivery:
    """Make the artifact of a pipeline, or that of a simpler one where it is no faster.

    Runs the design's code, and for STANDARD and AGGRESSIVE a C++ compiler, for minutes: in a
    process of its own. Raises as :func:`package` does; what fails to compile is no error.
    """
    manifest, files = package(blueprint, graph, device)
    if pipeline is Pipeline.FAST:
        return Delivery(manifest, files)
    # Imported here, as Inductor takes seconds that FAST has no use for.
    from esper.tezzeret.attempts import compile_fastest
    from esper.tezzeret.variants import STANDARD, variants

    kernel = Kernel.build(manifest, files).to(device)
    native, findings = None, "all of its seeds compute as one, by the op bottleneck"
    if kernel.program.bottleneck is None:
        native, findings = compile_fastest(kernel, variants(pipeline, device))
    if native is None:
        remark = f"{pipeline} points to kernel {manifest.artifact_id} of FAST: {findings}"
        return Delivery(manifest, files, remark)
    remark = ""
    if pipeline is Pipeline.AGGRESSIVE and native.variant == STANDARD:
        pipeline, remark = Pipeline.STANDARD, f"AGGRESSIVE delivers what STANDARD does: {findings}"
    files = files | native.files
    update = {"pipeline": pipeline, "files": _digests(files), "native": native.build}
    return Delivery(manifest.model_copy(update=update), files, remark)


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
