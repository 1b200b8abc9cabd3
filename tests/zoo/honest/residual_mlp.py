"""A residual MLP, zero at the start."""

from urabrask_artifacts import Artifact, residual_mlp


def artifact() -> Artifact:
    return residual_mlp()
