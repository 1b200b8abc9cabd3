"""Its manifest names a dtype that no kernel can have."""

from urabrask_artifacts import Artifact, residual_mlp

CHECK, REASON = "manifest", "no kernel can be for int8"


def artifact() -> Artifact:
    manifest, files = residual_mlp()
    return manifest.model_copy(update={"dtype": "int8"}), files
