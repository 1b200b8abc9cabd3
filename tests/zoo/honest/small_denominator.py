"""Delicate: divides by a root that is close to zero for small numbers."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.square.default", (ACT,)),
        ("aten.mean.dim", (Ref("node", 0), (1,), True)),
        ("aten.add.Scalar", (Ref("node", 1), 1e-6)),
        ("aten.rsqrt.default", (Ref("node", 2),)),
        ("aten.mul.Tensor", (ACT, Ref("node", 3))),
    )
    return made(nodes, nodes)
