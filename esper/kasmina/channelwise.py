"""Programs whose seeds can be computed as one, on tensors that hold all seeds' channels.

Such a program keeps the channels of its values in dimension 1 and never mixes those of two seeds
when they are laid side by side: a convolution becomes a grouped one with as many times the groups,
and what works element by element stays as it is. The convolution of the layer's input, which the
seeds share, needs no groups: the weights of all seeds, stacked, make one wide convolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from esper.channels import Geometry, grouped_convolution
from esper.kasmina.graph import Graph, Node, Ref, TensorSpec, Value
from esper.kasmina.operators import operator
from esper.kasmina.source import KernelFunction, python_function, python_source

_INP, _ACT = Ref("input", "inp"), Ref("input", "act")
_CONVOLUTIONS = {f"aten.conv{rank}d.default": rank for rank in (1, 2, 3)}
_GROUP_NORM = "aten.group_norm.default"
_GROUPS = {_GROUP_NORM: "num_groups"} | dict.fromkeys(_CONVOLUTIONS, "groups")
_NAMES = (
    "elu gelu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu relu6 silu softplus "
    "softshrink celu selu sigmoid tanh abs cos erf exp expm1 neg sign sin sqrt square"
)
_ELEMENTWISE = frozenset(f"aten.{name}.default" for name in _NAMES.split())
_ARITHMETIC = frozenset(
    f"aten.{name}.{kind}" for name in ("add", "sub", "mul") for kind in ("Tensor", "Scalar")
)


class Entry(NamedTuple):
    """The convolution of the layer's input, by the positions of its weights."""

    weight: int
    bias: int | None
    geometry: Geometry


class Tail(NamedTuple):
    """A convolution at the end, whose result is added to ``act``.

    While the host does not hear the seed nobody needs its value, only its gradients.
    """

    trunk: Graph  # what comes before it
    weight: int
    bias: int | None
    geometry: Geometry
    groups: int


@dataclass(frozen=True)
class Channelwise:
    """A program of seeds side by side; the entry's result takes the place of ``inp`` in ``graph``."""

    entry: Entry | None  # None where the input is not read
    graph: Graph
    parameters: tuple[TensorSpec, ...]
    tail: Tail | None = None  # where the program has one

    def compile(self, num_seeds: int) -> KernelFunction:
        """Return ``run(entered, act, params, ())`` on the channels of that many seeds."""
        return self._compiled(self.graph, num_seeds)

    def compile_trunk(self, num_seeds: int) -> KernelFunction | None:
        """Return the same up to the tail, or None where there is none."""
        return None if self.tail is None else self._compiled(self.tail.trunk, num_seeds)

    def _compiled(self, graph: Graph, num_seeds: int) -> KernelFunction:
        nodes = tuple(_widened(node, num_seeds) for node in graph.nodes)
        params = [Ref("param", spec.name) for spec in self.parameters]
        source = python_source(replace(graph, nodes=nodes), params, [])
        return python_function(source, _SIDE_BY_SIDE)


def recognise(
    graph: Graph, parameters: tuple[TensorSpec, ...], act: TensorSpec
) -> Channelwise | None:
    """Return how the seeds of ``graph`` are computed side by side, or None if they cannot be."""
    rank = len(act.shape) - 2  # spatial
    readers = [index for index, node in enumerate(graph.nodes) if _INP in node.references()]
    if rank < 1 or len(readers) > 1:
        return None
    widths = {_ACT: act.shape[1]}
    shapes = {Ref("param", spec.name): spec.shape for spec in parameters}
    entry = None
    for index in readers:
        entry = _entry(graph.nodes[index], rank, list(shapes))
        if entry is None:
            return None
        widths[_INP] = parameters[entry.weight].shape[0]
        graph = _without(graph, index)
    for index, node in enumerate(graph.nodes):
        width = _width(node, rank, widths, shapes)
        if width is None:
            return None
        widths[Ref("node", index)] = width
    if widths.get(graph.output) != widths[_ACT]:
        return None
    return Channelwise(entry, graph, parameters, _tail(graph, rank, list(shapes)))


def _entry(node: Node, rank: int, params: list[Ref]) -> Entry | None:
    """Return the node as the entry if it convolves ``inp``, all of it, by parameters."""
    if _CONVOLUTIONS.get(node.op) != rank:
        return None
    bound = _bound(node)
    weight, bias = bound["weight"], bound.get("bias")
    whole = bound["input"] == _INP and bound.get("groups", 1) == 1
    if not whole or weight not in params or not (bias is None or bias in params):
        return None
    return Entry(
        params.index(weight),
        None if bias is None else params.index(bias),
        _geometry(bound, rank),
    )


def _tail(graph: Graph, rank: int, params: list[Ref]) -> Tail | None:
    """Return how the graph ends, if it adds a convolution of its own to ``act``."""
    at = len(graph.nodes) - 2
    if at < 0 or graph.output != Ref("node", at + 1):
        return None
    *before, last, added = graph.nodes
    result = Ref("node", at)
    is_sum = added.op == "aten.add.Tensor" and not added.kwargs
    if not is_sum or added.args not in ((_ACT, result), (result, _ACT)):
        return None
    if _CONVOLUTIONS.get(last.op) != rank:
        return None
    bound = _bound(last)
    weight, bias = bound["weight"], bound.get("bias")
    if weight not in params or isinstance(bound.get("padding"), str):
        return None
    return Tail(
        Graph(tuple(before), bound["input"]),
        params.index(weight),
        None if bias is None else params.index(bias),
        _geometry(bound, rank),
        bound.get("groups", 1),
    )


def _geometry(bound: Mapping[str, Any], rank: int) -> Geometry:
    """Return that of a convolution, given its arguments by name."""
    defaults = (("stride", 1), ("padding", 0), ("dilation", 1))
    return Geometry(*(_each(bound.get(name, default), rank) for name, default in defaults))


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """Return one number a dimension; ATen takes a single one for all."""
    numbers = value if isinstance(value, tuple) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def _without(graph: Graph, index: int) -> Graph:
    """Return the graph without a node, whose result comes in as ``inp``."""

    def moved(value: Value) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(item) for item in value)
        if not isinstance(value, Ref) or not isinstance(value.key, int) or value.key < index:
            return value
        return _INP if value.key == index else Ref("node", value.key - 1)

    nodes = tuple(
        Node(node.op, moved(node.args), {name: moved(v) for name, v in node.kwargs.items()})
        for node in (*graph.nodes[:index], *graph.nodes[index + 1 :])
    )
    return Graph(nodes, moved(graph.output))


def _convolve_side_by_side(rank: int, **bound: Any) -> Tensor:
    geometry = _geometry(bound, rank)
    bias, groups = bound.get("bias"), bound["groups"]
    return grouped_convolution(bound["input"], bound["weight"], bias, geometry, groups)


_SIDE_BY_SIDE = tuple(
    (operator(name).identifier, partial(_convolve_side_by_side, rank))
    for name, rank in _CONVOLUTIONS.items()
)


def _width(
    node: Node,
    rank: int,
    widths: Mapping[Ref, int | None],
    shapes: Mapping[Ref, tuple[int | None, ...]],
) -> int | None:
    """Return the channels of one seed in the node's result; None if it would mix seeds."""
    if node.op in _ELEMENTWISE or node.op in _ARITHMETIC:
        # Operands of different widths would be broadcast over the seeds.
        found = {widths.get(ref) for ref in node.references()}
        return found.pop() if len(found) == 1 else None
    if _CONVOLUTIONS.get(node.op) != rank and node.op != _GROUP_NORM:
        return None
    bound = _bound(node)
    given = bound["input"]
    weights = [bound[name] for name in ("weight", "bias") if bound.get(name) is not None]
    if given not in widths or not all(weight in shapes for weight in weights):
        return None
    return widths[given] if node.op == _GROUP_NORM else shapes[bound["weight"]][0]


def _widened(node: Node, num_seeds: int) -> Node:
    groups = _GROUPS.get(node.op)
    if groups is None:
        return node
    bound = _bound(node)
    return Node(node.op, (), {**bound, groups: bound.get(groups, 1) * num_seeds})


def _bound(node: Node) -> dict[str, Any]:
    return {
        parameter.name: value for parameter, value in operator(node.op).bind(node.args, node.kwargs)
    }
