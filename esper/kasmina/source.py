"""From a checked graph to flat Python source, and from source to a function.

A file has no say over the source that is made from it: every identifier is ours, and literals
are printed by ``repr`` after their type was checked against the operator's schema.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from torch import Tensor

from esper.kasmina.graph import DTYPES, DType, Graph, Node, Ref, Value
from esper.kasmina.operators import fast_bindings, operator

KernelFunction = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
Bindings = tuple[tuple[str, Callable[..., Any]], ...]  # functions by their identifier


def python_source(graph: Graph, params: Sequence[Ref], buffers: Sequence[Ref]) -> str:
    """Return the source of ``run(inp, act, params, buffers) -> out``."""
    names = {Ref("input", "inp"): "inp", Ref("input", "act"): "act"}
    names |= {ref: f"p{i}" for i, ref in enumerate(params)}
    names |= {ref: f"b{i}" for i, ref in enumerate(buffers)}
    names |= {Ref("node", i): f"v{i}" for i in range(len(graph.nodes))}
    lines = ["def run(inp, act, params, buffers):"]
    if params:
        lines.append(f"[{', '.join(names[ref] for ref in params)}] = params")
    if buffers:
        lines.append(f"[{', '.join(names[ref] for ref in buffers)}] = buffers")
    lines += _statements(graph, names)
    return "\n    ".join(lines) + "\n"


@lru_cache(maxsize=1024)
def python_function(source: str, instead: Bindings = ()) -> KernelFunction:
    """Return the function that ``source`` defines; equal sources share one.

    ``instead`` has what it calls in place of the whitelist's function of that identifier.
    """
    scope: dict[str, KernelFunction] = {}
    exec(compile(source, "<esper kernel>", "exec"), _globals(instead), scope)
    return scope["run"]


@cache
def _globals(instead: Bindings) -> dict[str, Any]:
    """What generated source can see: the whitelist and the dtypes.

    ``__import__`` is for torch alone, which imports some of its parts when they are first needed
    and looks the function up in the calling frame; the source has no way to name it.
    """
    return {
        "__builtins__": {"__import__": __import__},
        **fast_bindings(),
        **DTYPES,
        **dict(instead),
    }


def _statements(graph: Graph, names: Mapping[Ref, str]) -> Iterator[str]:
    last_uses = _last_uses(graph)
    for index, node in enumerate(graph.nodes):
        yield f"v{index} = {_call(node, names)}"
        if last_uses[index]:
            # As in a module tree, an activation that nobody needs any more is freed at once.
            yield "del " + ", ".join(names[ref] for ref in last_uses[index])
    yield f"return {names[graph.output]}"


def _last_uses(graph: Graph) -> list[list[Ref]]:
    """For each node, the results that no later statement reads."""
    last_uses: list[list[Ref]] = [[] for _ in graph.nodes]
    seen = {graph.output}
    for index in reversed(range(len(graph.nodes))):
        for ref in (Ref("node", index), *graph.nodes[index].references()):
            if ref.kind == "node" and ref not in seen:
                seen.add(ref)
                last_uses[index].append(ref)
    return last_uses


def _call(node: Node, names: Mapping[Ref, str]) -> str:
    arguments = [_literal(arg, names) for arg in node.args]
    arguments += [f"{name}={_literal(value, names)}" for name, value in node.kwargs.items()]
    return f"{operator(node.op).identifier}({', '.join(arguments)})"


def _literal(value: Value, names: Mapping[Ref, str]) -> str:
    match value:
        case Ref():
            return names[value]
        case DType():
            return value.name
        case tuple():
            # A tuple of constants is made once, a list at every call.
            items = ", ".join(_literal(item, names) for item in value)
            return f"({items},)" if len(value) == 1 else f"({items})"
        case _:
            return repr(value)
