"""A graph that Dynamo has traced, written as JSON and built anew in another process.

Nothing is pickled. Functions are written as the names under which they are found again, tensors as
what a compiler asks of them: sizes, strides, dtype, device, and with whom they share memory.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._guards import GuardSource, Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.node import _get_qualified_name

from esper.errors import EsperError

Json = Any

_NAMED = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


class UnportableGraphError(EsperError):
    """A graph holds something that cannot be told to another process."""


def write_graph(module: fx.GraphModule) -> Json:
    """Return what :func:`read_graph` needs; raises :class:`UnportableGraphError`."""
    children = {k: v for k, v in module.named_children() if isinstance(v, fx.GraphModule)}
    if len(children) < len(list(module.children())) or module.state_dict():
        raise UnportableGraphError("it holds modules or tensors of its own")
    return {
        "nodes": [_write_node(node) for node in module.graph.nodes],
        "children": {name: write_graph(child) for name, child in children.items()},
    }


def read_graph(data: Json) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        nodes[entry["name"]] = _read_node(graph, entry, nodes)
    children = {name: read_graph(child) for name, child in data["children"].items()}
    return fx.GraphModule(nn.ModuleDict(children), graph)


def _write_node(node: fx.Node) -> Json:
    target = node.target
    return {
        "op": node.op,
        "name": node.name,
        "target": target if isinstance(target, str) else _name_of(target),
        "args": _write(list(node.args)),
        "kwargs": _write(dict(node.kwargs)),
        "static": node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"),
    }


def _read_node(graph: fx.Graph, entry: Json, nodes: dict[str, fx.Node]) -> fx.Node:
    op, name, target = entry["op"], entry["name"], entry["target"]
    node = graph.create_node(
        op,
        _found(target) if op == "call_function" else target,
        tuple(_read(entry["args"], nodes)),
        _read(entry["kwargs"], nodes),
        name,
    )
    if op == "placeholder":
        # As Dynamo leaves them for AOTAutograd.
        node._dynamo_source = _Source(name)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": entry["static"]}
    return node


def _source(node: fx.Node) -> Source:
    source: Source = node._dynamo_source  # type: ignore[attr-defined]
    return source


def _name_of(function: Callable[..., Any]) -> str:
    name = str(function) if isinstance(function, torch._ops.OpOverload) else ""
    name = f"torch.ops.{name}" if name else _get_qualified_name(function)
    if _found(name) is not function:
        raise UnportableGraphError(f"{function} is not found again as {name}")
    return name


def _found(name: str) -> Any:
    """Return what a dotted name stands for."""
    if name.startswith("torch."):
        return reduce(getattr, name.split(".")[1:], torch)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module or "builtins"), attribute)


def _write(value: Any) -> Json:
    match value:
        case None | bool() | str():
            return value
        case int() if type(value) is int:
            return value
        case float() if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        case fx.Node():
            return {"node": value.name}
        case torch.Size() | list():
            return [_write(item) for item in value]
        case tuple() if type(value) is tuple:
            return {"tuple": [_write(item) for item in value]}
        case dict():
            return {"dict": [[key, _write(item)] for key, item in value.items()]}
        case slice():
            return {"slice": [_write(i) for i in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
        case _ if value is Ellipsis:
            return {"ellipsis": None}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise UnportableGraphError(f"an argument is a {type(value).__name__}: {value!r}")


def _read(data: Json, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_read(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    [(kind, content)] = data.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "tuple":
            return tuple(_read(item, nodes) for item in content)
        case "dict":
            return {key: _read(item, nodes) for key, item in content}
        case "slice":
            return slice(*(_read(item, nodes) for item in content))
        case "device":
            return torch.device(content)
        case "ellipsis":
            return ...
        case _:
            return getattr(torch, content)


# ---------------------------------------------------------------------- example inputs


def write_inputs(module: fx.GraphModule, inputs: Sequence[Any]) -> Json:
    """Return what :func:`read_inputs` needs of the graph's example inputs."""
    storages: dict[int, int] = {}  # numbered in the order in which they appear
    placeholders = module.graph.find_nodes(op="placeholder")
    return [_write_input(*pair, storages) for pair in zip(placeholders, inputs, strict=True)]


def _write_input(node: fx.Node, value: Any, storages: dict[int, int]) -> Json:
    traced = node.meta["example_value"]
    if isinstance(traced, torch.SymInt) and traced.node.expr.is_Symbol:
        return {"symbol": str(traced), "hint": traced.node.hint, "source": _source(node).name}
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise UnportableGraphError(f"an input is a {type(value).__name__}")
    storage = value.untyped_storage()
    return {
        "storage": storages.setdefault(storage._cdata, len(storages)),
        "storage_bytes": storage.nbytes(),
        "offset": value.storage_offset(),
        "shape": [_write_size(size) for size in traced.shape],
        "stride": [_write_size(size) for size in traced.stride()],
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "requires_grad": value.requires_grad,
        "is_parameter": isinstance(value, nn.Parameter),
    }


def _write_size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size.node.expr)


def read_inputs(data: Json, mode: FakeTensorMode) -> list[Any]:
    """Return fake tensors, which share memory where the example inputs do, and symbolic sizes."""
    storages = {
        entry["storage"]: torch.UntypedStorage(entry["storage_bytes"], device="meta")
        for entry in data
        if "storage" in entry
    }
    symbols = {entry["symbol"]: _read_symbol(entry, mode) for entry in data if "symbol" in entry}
    return [
        symbols[entry["symbol"]]
        if "symbol" in entry
        else _read_tensor(entry, storages[entry["storage"]], symbols, mode)
        for entry in data
    ]


def _read_symbol(entry: Json, mode: FakeTensorMode) -> torch.SymInt:
    """Return a size of the same name, which is made of that of its source."""
    source, env = _Source(entry["source"]), mode.shape_env
    assert env is not None
    symbol = env.create_symbol(entry["hint"], source, DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=entry["hint"], source=source)
    assert isinstance(size, torch.SymInt)
    return size


def _read_tensor(
    entry: Json,
    storage: torch.UntypedStorage,
    symbols: dict[str, torch.SymInt],
    mode: FakeTensorMode,
) -> Tensor:
    shape, stride = ([_read_size(s, symbols) for s in entry[key]] for key in ("shape", "stride"))
    dtype, device = getattr(torch, entry["dtype"]), torch.device(entry["device"])
    if any(isinstance(size, torch.SymInt) for size in (*shape, *stride)):
        with mode:
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    else:
        meta = torch.empty(0, dtype=dtype, device="meta")
        fake = FakeTensor(mode, meta.set_(storage, entry["offset"], shape, stride), device)
    if entry["is_parameter"]:
        return nn.Parameter(fake, entry["requires_grad"])
    return fake.requires_grad_(entry["requires_grad"])


def _read_size(size: int | str, symbols: dict[str, torch.SymInt]) -> Any:
    """Return a number, or what a product or sum of numbers and symbols is with these symbols."""
    if isinstance(size, int):
        return size
    names = {name: symbol.node.expr for name, symbol in symbols.items()}
    env = next(iter(symbols.values())).node.shape_env
    return env.create_symintnode(sympy.sympify(size, names), hint=None)


@dataclass(frozen=True)
class _Source(Source):
    """What Dynamo says of where an input comes from, as far as others ask."""

    text: str

    @property
    def _name_template(self) -> str:
        return self.text

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.LOCAL
