"""A residual MLP in float64."""

from urabrask_artifacts import Artifact, residual_mlp


def artifact() -> Artifact:
    return residual_mlp(dtype="float64")
