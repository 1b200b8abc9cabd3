"""The convolutional design, strided, on images."""

from urabrask_artifacts import Artifact

from zoo.designs import IMAGES, traced


def artifact() -> Artifact:
    return traced("conv_bottleneck", IMAGES)
