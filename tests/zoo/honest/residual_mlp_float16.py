"""A residual MLP in float16."""

from urabrask_artifacts import Artifact, residual_mlp


def artifact() -> Artifact:
    return residual_mlp(dtype="float16")
