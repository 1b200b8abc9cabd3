"""The gated design in bfloat16."""

from urabrask_artifacts import Artifact

from zoo.designs import LINEAR, traced


def artifact() -> Artifact:
    return traced("gated", LINEAR, dtype="bfloat16")
