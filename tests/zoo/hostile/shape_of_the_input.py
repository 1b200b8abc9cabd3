"""Its graph gives its input's shape."""

from urabrask_artifacts import INP, Artifact, graph
from urabrask_artifacts import artifact as made

CHECK, REASON = "output", "\\(1, 6\\) on cpu, expected torch.float32 \\(1, 4\\)"


def artifact() -> Artifact:
    relu = graph(("aten.relu.default", (INP,)))
    return made(relu, relu)
