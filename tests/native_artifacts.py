"""One artifact with machine code, made once a session: two runs of a real C++ compiler."""

import functools

import forge_samples as samples

from esper import blueprints
from esper.contracts import KernelManifest, NativeBuild, Pipeline, Speedup
from esper.kasmina.kernel import Kernel
from esper.kasmina.native import native_target
from esper.tezzeret.inductor import compile_step
from esper.tezzeret.trial import Bench
from esper.tezzeret.variants import STANDARD

Artifact = tuple[KernelManifest, dict[str, bytes]]

DEMANDS = ("inp+act+weights", "weights")


@functools.cache
def gated() -> Artifact:
    """The design on the site "linear", used for :data:`DEMANDS`, whatever is faster here."""
    manifest, files = samples.artifact(blueprints.get("gated"))
    kernel = Kernel.build(manifest, files)
    inp, act = Bench(kernel).example()
    libraries = compile_step(kernel, inp, act, STANDARD)
    build = NativeBuild(
        target=native_target("cpu"),
        variant=STANDARD.name,
        options={},
        speedups=dict.fromkeys(DEMANDS, Speedup(median=1.2, low=1.1, high=1.3)),
        gradient_error=1e-7,
    )
    return repacked((manifest, files), libraries, native=build, pipeline=Pipeline.STANDARD)


def repacked(artifact: Artifact, files: dict[str, bytes], **changes: object) -> Artifact:
    """Replace files, with a manifest that names the new ones and has these changes."""
    manifest, others = artifact
    files = others | files
    digests = {name: samples.digest(data) for name, data in files.items()}
    return manifest.model_copy(update={"files": digests, **changes}), files
