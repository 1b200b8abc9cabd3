"""Its manifest names another number of parameters."""

from urabrask_artifacts import Artifact, residual_mlp

CHECK, REASON = "graph", "parameters, the manifest says 1"


def artifact() -> Artifact:
    manifest, files = residual_mlp()
    return manifest.model_copy(update={"num_parameters": 1}), files
