"""Delicate: a cumulative sum, whose rounding depends on the order."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.cumsum.default", (ACT, 1)),
        ("aten.add.Tensor", (ACT, Ref("node", 0))),
    )
    return made(nodes, nodes)
