"""A fixed function without parameters."""

from urabrask_artifacts import Artifact

from zoo.designs import SEQUENCE, traced


def artifact() -> Artifact:
    return traced("standardize", SEQUENCE)
