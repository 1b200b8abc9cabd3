"""Its graph multiplies what does not fit together."""

from urabrask_artifacts import ACT, INP, Artifact, graph
from urabrask_artifacts import artifact as made

CHECK, REASON = "runs", "mat1 and mat2 shapes cannot be multiplied"


def artifact() -> Artifact:
    product = graph(("aten.matmul.default", (INP, ACT)))
    return made(product, product)
