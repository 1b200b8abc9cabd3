"""Delicate: exponentials that overflow unless the largest is taken out."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.mul.Scalar", (ACT, 50.0)),
        ("aten.logsumexp.default", (Ref("node", 0), (1,), True)),
        ("aten.add.Tensor", (ACT, Ref("node", 1))),
    )
    return made(nodes, nodes)
