"""The learned norm over a sequence."""

from urabrask_artifacts import Artifact

from zoo.designs import SEQUENCE, traced


def artifact() -> Artifact:
    return traced("norm", SEQUENCE)
