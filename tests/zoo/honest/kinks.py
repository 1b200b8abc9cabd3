"""Delicate: a gradient that jumps where numbers are zero."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.relu.default", (ACT,)),
        ("aten.abs.default", (ACT,)),
        ("aten.add.Tensor", (Ref("node", 0), Ref("node", 1))),
    )
    return made(nodes, nodes)
