"""The low-rank design at a linear layer."""

from urabrask_artifacts import Artifact

from zoo.designs import LINEAR, traced


def artifact() -> Artifact:
    return traced("low_rank", LINEAR)
