"""Its manifest names another site."""

from urabrask_artifacts import SITE, Artifact, residual_mlp

CHECK, REASON = "graph", "the manifest says"


def artifact() -> Artifact:
    manifest, files = residual_mlp()
    wider = SITE.model_copy(update={"inp_shape": (None, 8)})
    return manifest.model_copy(update={"site": wider}), files
