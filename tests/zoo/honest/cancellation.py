"""Delicate: a difference of large numbers, of which float32 loses four digits."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.add.Scalar", (ACT, 100.0)),
        ("aten.sub.Scalar", (Ref("node", 0), 100.0)),
        ("aten.add.Tensor", (ACT, Ref("node", 1))),
    )
    return made(nodes, nodes)
