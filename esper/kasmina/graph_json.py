"""Reading and writing ``graph.json``.

Values are written so that reading them back gives the same Python type: integers, booleans,
``null``, strings and lists as themselves, and with a tag ``{"float": 0.5}`` (canonical JSON
writes 1.0 as 1), ``{"dtype": "float32"}``, ``{"input": "inp"}``, ``{"param": "down.weight"}``,
``{"buffer": "norm.running_mean"}`` and ``{"node": 3}``.
"""

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from esper.errors import ArtifactError
from esper.kasmina.graph import DTYPES, DType, Graph, Node, Ref, TensorSpec, Value

MAX_JSON_BYTES = 4 * 2**20
MAX_INTEGER = 2**53 - 1  # the largest that canonical JSON can carry

T = TypeVar("T")


def parse(data: bytes) -> Any:
    """Parse JSON, refusing what is too large, repeats a key or is not plain JSON."""
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactError(f"{len(data)} bytes, at most {MAX_JSON_BYTES} are allowed")
    try:
        return json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not valid JSON: {error}") from None


def fields(data: Any, *names: str) -> list[Any]:
    """Return the fields of a JSON object that has exactly these."""
    if not isinstance(data, dict) or data.keys() != set(names):
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(f"expected an object with {', '.join(names)}, got {found}")
    return [data[name] for name in names]


def integer(data: Any) -> int:
    if type(data) is not int or abs(data) > MAX_INTEGER:
        raise ArtifactError(f"expected an integer of at most 53 bits, got {str(data)[:64]}")
    return data


def sequence(data: Any, read: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(data, list):
        raise ArtifactError(f"expected a list, got {type(data).__name__}")
    return tuple(read(item) for item in data)


def read_spec(data: Any) -> TensorSpec:
    name, shape, dtype = fields(data, "name", "shape", "dtype")
    if not isinstance(name, str):
        raise ArtifactError(f"a tensor's name must be a string, got {type(name).__name__}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"{name!r}: unknown dtype {dtype!r}")
    return TensorSpec(name, sequence(shape, _read_size), dtype)


def write_spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def read_graph(data: Any) -> Graph:
    nodes, output = fields(data, "nodes", "output")
    ref = _read_value(output)
    if not isinstance(ref, Ref):
        raise ArtifactError(f"the output must be a reference, got {output!r}")
    return Graph(sequence(nodes, _read_node), ref)


def write_graph(graph: Graph) -> dict[str, Any]:
    return {"nodes": [_write_node(n) for n in graph.nodes], "output": _write_value(graph.output)}


def _read_size(data: Any) -> int | None:
    if data is None:
        return None
    size = integer(data)
    if size < 0:
        raise ArtifactError(f"a size cannot be negative, got {size}")
    return size


def _read_node(data: Any) -> Node:
    op, args, kwargs = fields(data, "op", "args", "kwargs")
    if not isinstance(op, str) or not isinstance(kwargs, dict):
        raise ArtifactError(f"a node needs a string as op and an object as kwargs, got {op!r}")
    return Node(op, sequence(args, _read_value), {k: _read_value(v) for k, v in kwargs.items()})


def _write_node(node: Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "args": [_write_value(arg) for arg in node.args],
        "kwargs": {name: _write_value(value) for name, value in node.kwargs.items()},
    }


def _read_value(data: Any) -> Value:
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, list):
        return sequence(data, _read_value)
    if isinstance(data, dict):
        return _read_tagged(data)
    return integer(data)


def _read_tagged(data: dict[str, Any]) -> Value:
    if len(data) == 1:
        [(tag, content)] = data.items()
        match tag, content:
            case "float", int() | float() if math.isfinite(content):
                return float(content)
            case "dtype", str():
                return DType(content)
            case "input" | "param" | "buffer", str():
                return Ref(tag, content)
            case "node", int():
                return Ref("node", integer(content))
    raise ArtifactError(f"not a value: {str(data)[:64]}")


def _write_value(value: Value) -> Any:
    match value:
        case Ref():
            return {value.kind: value.key}
        case DType():
            return {"dtype": value.name}
        case float():
            return {"float": value}
        case tuple():
            return [_write_value(item) for item in value]
        case _:
            return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object repeats a key")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
