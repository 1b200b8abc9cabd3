"""The depthwise design on images."""

from urabrask_artifacts import Artifact

from zoo.designs import IMAGES, traced


def artifact() -> Artifact:
    return traced("depthwise", IMAGES)
