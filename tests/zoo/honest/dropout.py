"""Stochastic in training, as its graph declares."""

from urabrask_artifacts import Artifact, residual_mlp


def artifact() -> Artifact:
    return residual_mlp(dropout=0.5)
