"""Its gradient is another than its differences say, on purpose."""

from urabrask_artifacts import ACT, Artifact, graph
from urabrask_artifacts import artifact as made

from esper.kasmina.graph import Ref


def artifact() -> Artifact:
    nodes = graph(
        ("aten.sign.default", (ACT,)),
        ("aten.sub.Tensor", (Ref("node", 0), ACT)),
        ("aten.detach.default", (Ref("node", 1),)),
        ("aten.add.Tensor", (ACT, Ref("node", 2))),
    )
    return made(nodes, nodes)
