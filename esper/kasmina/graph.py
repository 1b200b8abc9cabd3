"""A kernel's graph as data, and the rules that it must obey before anything is made of it.

A graph is in SSA form: each node calls one whitelisted operator, and its arguments are literals
or references to the two inputs, to a parameter or buffer by name, or to an earlier node by index.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from esper.errors import ArtifactError
from esper.kasmina.operators import NUMBER_TYPES, operator

MAX_NODES = 4096
MAX_ITEMS = 1024  # of one list

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}

_TENSOR_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_STRING = re.compile(r"[\w ,.>-]{0,64}", re.ASCII)  # modes, and equations of einsum


@dataclass(frozen=True)
class Ref:
    """Reference to ``inp`` or ``act``, a parameter or buffer by name, or a node by index."""

    kind: Literal["input", "param", "buffer", "node"]
    key: str | int

    def __str__(self) -> str:
        return f"{self.kind} {self.key!r}"


@dataclass(frozen=True)
class DType:
    name: str


Value = Ref | DType | bool | int | float | str | None | tuple["Value", ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (``None`` where any size is allowed) and dtype of an input or a weight."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Node:
    op: str
    args: tuple[Value, ...]
    kwargs: Mapping[str, Value]

    def references(self) -> Iterator[Ref]:
        yield from _references(self.args)
        yield from _references(tuple(self.kwargs.values()))


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    output: Ref


def flat_name(name: str) -> str:
    """Return the attribute name under which a kernel registers the weight ``name``."""
    return name.replace(".", "__")


def check_weights(parameters: Sequence[TensorSpec], buffers: Sequence[TensorSpec]) -> None:
    """Raise :class:`ArtifactError` unless these can be the weights of one module."""
    for spec in (*parameters, *buffers):
        if not _TENSOR_NAME.fullmatch(spec.name):
            raise ArtifactError(f"{spec.name!r} is not a valid name of a weight")
        if None in spec.shape:
            raise ArtifactError(f"{spec.name!r}: a weight needs a fixed shape, got {spec.shape}")
    for spec in parameters:
        if not DTYPES[spec.dtype].is_floating_point:
            raise ArtifactError(f"{spec.name!r}: a parameter cannot be of dtype {spec.dtype}")
    names = sorted(flat_name(spec.name) for spec in (*parameters, *buffers))
    for name, following in pairwise(names):
        if name == following:
            raise ArtifactError(f"duplicate name of a weight: {name!r}")


def check_graph(graph: Graph, weights: Sequence[Ref]) -> None:
    """Raise :class:`ArtifactError`, naming the node, unless the graph may be run."""
    if len(graph.nodes) > MAX_NODES:
        raise ArtifactError(f"{len(graph.nodes)} nodes, at most {MAX_NODES} are allowed")
    types = dict.fromkeys([Ref("input", "inp"), Ref("input", "act"), *weights], "Tensor")
    for index, node in enumerate(graph.nodes):
        try:
            types[Ref("node", index)] = _check_node(node, types)
        except ArtifactError as error:
            raise ArtifactError(f"node {index} ({node.op}): {error}") from None
    if types.get(graph.output) != "Tensor":
        raise ArtifactError(f"the output, {graph.output}, is not a tensor of this graph")


def _check_node(node: Node, types: Mapping[Ref, str]) -> str:
    """Return the type of the node's result."""
    op = operator(node.op)
    for ref in node.references():
        if ref not in types:
            raise ArtifactError(f"undefined reference to {ref}")
    for parameter, value in op.bind(node.args, node.kwargs):
        if not _fits(value, parameter.type, types):
            raise ArtifactError(f"argument {parameter.name!r}: {value!r} is no {parameter.type}")
        if parameter.name in op.written and not _is_buffer_or_none(value):
            raise ArtifactError(f"would write to {parameter.name!r}, which is not a buffer")
    return op.returns


def _fits(value: Value, expected: str, types: Mapping[Ref, str]) -> bool:
    """Tell whether ``value`` may be passed where the ATen schema says ``expected``."""
    if expected.startswith("Optional["):
        return value is None or _fits(value, expected[len("Optional[") : -1], types)
    if isinstance(value, tuple):
        item = expected[len("List[") : -1] if expected.startswith("List[") else None
        return (
            item is not None
            and len(value) <= MAX_ITEMS
            and all(_fits(v, item, types) for v in value)
        )
    if isinstance(value, Ref):
        return _ref_fits(types[value], expected)
    return _literal_fits(value, expected)


def _ref_fits(actual: str, expected: str) -> bool:
    # A number may stand for a tensor, as in x * n.
    return actual == expected or (actual == "number" and expected in NUMBER_TYPES | {"Tensor"})


def _literal_fits(value: DType | bool | int | float | str | None, expected: str) -> bool:
    match value:
        case DType():
            return expected == "ScalarType" and value.name in DTYPES
        case bool():
            return expected in {"bool", "number", "Tensor"}
        case int():
            # ATen accepts one integer for a list of equal ones, as in kernel_size=3.
            return expected in NUMBER_TYPES | {"Tensor", "List[int]"}
        case float():
            return expected in {"float", "number", "Tensor"}
        case str():
            return expected == "str" and _STRING.fullmatch(value) is not None
        case None:
            return False


def _is_buffer_or_none(value: Value) -> bool:
    return value is None or (isinstance(value, Ref) and value.kind == "buffer")


def _references(values: tuple[Value, ...]) -> Iterator[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from _references(value)
