"""Its graph takes the logarithm of negative numbers."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

CHECK, REASON = "finite", "out is not finite in float64 on ordinary inputs \\(batch 1, initial"


def artifact() -> Artifact:
    logarithm = graph(("aten.log.default", (ACT,)))
    return made(logarithm, logarithm)
