"""How fast a device could be at the very most: times below that floor were not measured."""

from collections.abc import Mapping

from torch import Tensor

from esper.contracts import Contract
from esper.kasmina.graph import Graph, Ref

# Operators that read every element of what they are given, so that none of it can be left in memory.
_READ_ALL = frozenset(
    f"aten.{name}"
    for name in (
        *("linear", "mm", "addmm", "bmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution"),
        *("add", "mul", "relu", "gelu", "silu", "sigmoid", "tanh", "softmax"),
        *("layer_norm", "batch_norm", "group_norm", "scaled_dot_product_attention"),
    )
)


class Ceilings(Contract):
    """What a device cannot exceed; 0 where that is not known."""

    memory_bytes_per_s: float = 0.0
    flops_per_s: float = 0.0


def floor_us(ceilings: Ceilings, read_bytes: int, flops: int) -> float:
    """Return the least that a forward takes with a cold cache."""
    by_memory = read_bytes / ceilings.memory_bytes_per_s if ceilings.memory_bytes_per_s else 0.0
    by_compute = flops / ceilings.flops_per_s if ceilings.flops_per_s else 0.0
    return 1e6 * max(by_memory, by_compute)


def read_bytes(graph: Graph, tensors: Mapping[Ref, Tensor]) -> int:
    """Return the bytes of those ``tensors`` that the graph cannot but read as a whole."""
    read = {
        value
        for node in graph.nodes
        if node.op.rpartition(".")[0] in _READ_ALL
        for value in node.args
        if isinstance(value, Ref)
    }
    return sum(tensor.nbytes for ref, tensor in tensors.items() if ref in read)
