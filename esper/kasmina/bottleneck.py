"""Recognising the programs that :func:`esper.bottleneck.bottleneck` computes in one go.

Most designs for a layer whose channels are last are two linear maps with an activation between,
added to the host's output. What such a program does is known in full, so its seeds need not be run
operator by operator, and all seeds of a layer that carry one such artifact run as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

from esper.kasmina.graph import Graph, Node, Ref, TensorSpec, Value

_INP, _ACT = Ref("input", "inp"), Ref("input", "act")
_ACTIVATIONS = {f"aten.{name}.default": name for name in ("relu", "silu", "tanh", "sigmoid")}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Bottleneck:
    """``act + up(activation(down(inp)))``, by the positions of its weights among the parameters."""

    down: int
    down_bias: int | None
    up: int
    up_bias: int | None
    activation: str

    @property
    def order(self) -> list[int]:
        """Positions of the weights there are, in the order down, bias, up, bias."""
        return [position for position in self._positions if position is not None]

    @property
    def places(self) -> list[int]:
        """Where down, bias, up, bias stand among the weights in that order; -1 for none."""
        present = iter(range(4))
        return [-1 if position is None else next(present) for position in self._positions]

    @property
    def _positions(self) -> tuple[int, int | None, int, int | None]:
        return self.down, self.down_bias, self.up, self.up_bias


def recognise(graph: Graph, parameters: Sequence[TensorSpec], act: TensorSpec) -> Bottleneck | None:
    """Return the form of ``graph``, or None if it is not a bottleneck over all ``parameters``."""
    if len(graph.nodes) not in (3, 4) or graph.output != Ref("node", len(graph.nodes) - 1):
        return None
    activation = _activation(graph.nodes[1]) if len(graph.nodes) == 4 else "identity"
    down = _linear(graph.nodes[0], _INP)
    up = _linear(graph.nodes[-2], Ref("node", len(graph.nodes) - 3))
    if activation is None or down is None or up is None:
        return None
    if not _adds_to_act(graph.nodes[-1], Ref("node", len(graph.nodes) - 2)):
        return None
    at = {spec.name: position for position, spec in enumerate(parameters)}
    found = Bottleneck(
        at[down.weight],
        None if down.bias is None else at[down.bias],
        at[up.weight],
        None if up.bias is None else at[up.bias],
        activation,
    )
    if sorted(found.order) != list(range(len(parameters))):
        return None
    width, channels = parameters[found.down].shape[0], act.shape[-1]
    # A branch of one channel would be broadcast over all of act's.
    return found if parameters[found.up].shape == (channels, width) else None


class _Linear(NamedTuple):
    """The names of its weights."""

    weight: str
    bias: str | None


def _linear(node: Node, source: Ref) -> _Linear | None:
    """Return the weights of ``node`` if it is a linear map of ``source`` by parameters."""
    if node.op != "aten.linear.default" or node.kwargs or node.args[0] != source:
        return None
    weight, bias = (*node.args[1:], None)[:2]
    if not _is_parameter(weight) or not (bias is None or _is_parameter(bias)):
        return None
    return _Linear(str(weight.key), None if bias is None else str(bias.key))


def _is_parameter(value: Value) -> TypeGuard[Ref]:
    return isinstance(value, Ref) and value.kind == "param"


def _activation(node: Node) -> str | None:
    """Return the name of an activation that is applied to the first node's result."""
    if node.args != (Ref("node", 0),):
        return None
    if node.op == "aten.gelu.default":
        return _GELUS.get(str(node.kwargs.get("approximate", "none")))
    return None if node.kwargs else _ACTIVATIONS.get(node.op)


def _adds_to_act(node: Node, branch: Ref) -> bool:
    summed = node.args in ((_ACT, branch), (branch, _ACT))
    return node.op == "aten.add.Tensor" and summed and not node.kwargs
