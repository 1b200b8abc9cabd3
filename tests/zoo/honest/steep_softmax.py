"""Delicate: a softmax of numbers so far apart that most of it vanishes."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.mul.Scalar", (ACT, 20.0)),
        ("aten.softmax.int", (Ref("node", 0), 1)),
        ("aten.add.Tensor", (ACT, Ref("node", 1))),
    )
    return made(nodes, nodes)
