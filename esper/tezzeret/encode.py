"""From what torch.export gives to a program: whitelisted nodes, without asserts and dead code."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from esper.errors import ArtifactError, BlueprintError, ForbiddenOperatorError
from esper.kasmina.graph import DTYPES, DType, Graph, Node, Ref, TensorSpec, Value
from esper.kasmina.operators import operator
from esper.kasmina.program import Program

_WEIGHTS: dict[InputKind, Literal["param", "buffer"]] = {
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
}
# Where a new tensor is put and how it is laid out follows from the operator's inputs.
_PLACEMENT = frozenset({"device", "layout", "memory_format", "pin_memory"})
# Export writes down the setting of the machine that it runs on, which may have no cuDNN.
_CUDNN_SWITCHES = frozenset({"cudnn_enable", "cudnn_enabled"})


def encode(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    *,
    module: nn.Module,
    inp: TensorSpec,
    act: TensorSpec,
    seed: int,
) -> Program:
    """Return the program of ``module``, exported in both modes.

    Raises :class:`ForbiddenOperatorError` for an operator that a kernel may not call,
    :class:`BlueprintError` for other things that it may not have, and :class:`ArtifactError` for
    a call that breaks another rule of the format.
    """
    first_names = _first_names(module)
    return Program(
        inp=inp,
        act=act,
        parameters=tuple(_spec(name, p) for name, p in module.named_parameters()),
        buffers=tuple(_spec(name, b) for name, b in module.named_buffers()),
        train=_encode_graph(train, first_names),
        eval=_encode_graph(evaluation, first_names),
        seed=seed,
    )


def dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BlueprintError(f"dtype {name} is not supported, only {', '.join(DTYPES)}")
    return name


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype))


def _first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a weight the first name of the same tensor, since weights may be tied."""
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names[name] = first.setdefault(id(tensor), name)
    return names


def _encode_graph(exported: ExportedProgram, first_names: Mapping[str, str]) -> Graph:
    refs = _placeholders(exported, first_names)
    needed = _needed(exported.graph)
    nodes: list[Node] = []
    for fx_node in exported.graph.nodes:
        if fx_node.op != "call_function" or fx_node not in needed:
            continue
        if _is_whole_slice(fx_node):
            refs[fx_node] = refs[fx_node.args[0]]
            continue
        nodes.append(_encode_node(fx_node, refs))
        refs[fx_node] = Ref("node", len(nodes) - 1)
    outputs = exported.graph.output_node().args[0]
    if len(outputs) != 1:
        raise BlueprintError(f"gives {len(outputs)} outputs, a kernel has one")
    return Graph(tuple(nodes), refs[outputs[0]])


def _placeholders(exported: ExportedProgram, first_names: Mapping[str, str]) -> dict[fx.Node, Ref]:
    by_name = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    inputs = iter(("inp", "act"))
    refs: dict[fx.Node, Ref] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            refs[by_name[spec.arg.name]] = Ref("input", next(inputs))
        elif spec.kind in _WEIGHTS and spec.target is not None:
            refs[by_name[spec.arg.name]] = Ref(_WEIGHTS[spec.kind], first_names[spec.target])
        else:
            raise BlueprintError(f"holds the constant {spec.target!r}: register it as a buffer")
    return refs


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output or a write depends on; the others only assert or do nothing."""
    pending = [graph.output_node(), *filter(_writes, graph.nodes)]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_whole_slice(node: fx.Node) -> bool:
    """Tell whether the node is the ``[:]`` that indexing of a later dimension leaves behind."""
    return node.target is torch.ops.aten.slice.Tensor and node.args[2:] == (0, sys.maxsize)


def _encode_node(fx_node: fx.Node, refs: Mapping[fx.Node, Ref]) -> Node:
    name = _operator_name(fx_node.target)
    try:
        op = operator(name)
    except ArtifactError as error:
        raise ForbiddenOperatorError(f"{error} ({_location(fx_node)})") from None
    args = tuple(
        True if parameter.name in _CUDNN_SWITCHES else _encode_value(value, refs)
        for parameter, value in zip(op.parameters, fx_node.args, strict=False)
    )
    kwargs = {
        name: _encode_value(value, refs)
        for name, value in fx_node.kwargs.items()
        if name not in _PLACEMENT
    }
    return Node(name, args, kwargs)


def _operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"operator.{target.__name__}" if target.__module__ == "_operator" else str(target)


def _location(node: fx.Node) -> str:
    """Return the line of the design's code that led to the node."""
    trace = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return ": ".join(trace[-2:]) if trace else f"node {node.name}"


def _encode_value(value: Any, refs: Mapping[fx.Node, Ref]) -> Value:
    match value:
        case fx.Node():
            return refs[value]
        case list() | tuple():
            return tuple(_encode_value(item, refs) for item in value)
        case torch.dtype():
            return DType(dtype_name(value))
        case sys.maxsize:
            return None
        case None | bool() | int() | float() | str():
            return value
    raise BlueprintError(f"a kernel cannot hold the constant {value!r}")
