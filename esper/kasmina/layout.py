"""The sizes and strides that machine code was compiled for, and whether tensors have them.

Sizes that may vary are symbols; others are numbers or follow from the symbols, such as a
convolution's output. As the compiler has it, no symbol stands for 0 or 1.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.errors import ArtifactError
from esper.kasmina.graph_json import fields, sequence

Expression = int | str | tuple[Any, ...]  # a number, a symbol, or an operation and its operands

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("add", "mul", "floordiv", "mod")
} | {"max": max}
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_ALL = OPERATIONS | RELATIONS
_SMALLEST = 2


@dataclass(frozen=True)
class TensorLayout:
    sizes: tuple[Expression, ...]
    strides: tuple[Expression, ...]


@dataclass(frozen=True)
class Layout:
    """Of several tensors together; ``relations`` hold between the symbols as well."""

    tensors: tuple[TensorLayout, ...]
    relations: tuple[Expression, ...]

    def admits(self, tensors: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
        """Tell whether tensors of these sizes and strides are what was compiled for."""
        pairs: list[tuple[Expression, int]] = []
        for layout, (sizes, strides) in zip(self.tensors, tensors, strict=True):
            if len(sizes) != len(layout.sizes):
                return False
            pairs += zip(layout.sizes + layout.strides, (*sizes, *strides), strict=True)
        values: dict[str, int] = {}
        for expression, number in pairs:
            if isinstance(expression, str):
                values.setdefault(expression, number)
        return (
            all(value >= _SMALLEST for value in values.values())
            and all(evaluate(expression, values) == number for expression, number in pairs)
            and all(evaluate(relation, values) for relation in self.relations)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": [{"sizes": t.sizes, "strides": t.strides} for t in self.tensors],
            "relations": self.relations,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Layout":
        """Read what :meth:`to_json` gave; :class:`ArtifactError` for anything else."""
        tensors, relations = fields(data, "tensors", "relations")
        layout = cls(sequence(tensors, _read_tensor), sequence(relations, _read_relation))
        bound = {e for t in layout.tensors for e in t.sizes + t.strides if isinstance(e, str)}
        used = {s for t in layout.tensors for e in t.sizes + t.strides for s in symbols(e)}
        used |= {s for relation in layout.relations for s in symbols(relation)}
        if unbound := used - bound:
            raise ArtifactError(f"symbol {min(unbound)!r} stands for no size or stride")
        return layout


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Return what ``expression`` is worth where its symbols have ``values``."""
    match expression:
        case int():
            return expression
        case str():
            return values[expression]
    name, first, second = expression
    return _ALL[name](evaluate(first, values), evaluate(second, values))


def symbols(expression: Expression) -> set[str]:
    match expression:
        case int():
            return set()
        case str():
            return {expression}
    return symbols(expression[1]) | symbols(expression[2])


def _read_tensor(data: Any) -> TensorLayout:
    sizes, strides = fields(data, "sizes", "strides")
    layout = TensorLayout(sequence(sizes, _read_number), sequence(strides, _read_number))
    if len(layout.sizes) != len(layout.strides):
        raise ArtifactError(f"{len(layout.sizes)} sizes, but {len(layout.strides)} strides")
    return layout


def _read_number(data: Any) -> Expression:
    if isinstance(data, str) or (isinstance(data, int) and not isinstance(data, bool)):
        return data
    return _read_operation(data, OPERATIONS)


def _read_relation(data: Any) -> Expression:
    return _read_operation(data, RELATIONS)


def _read_operation(data: Any, names: Mapping[str, Any]) -> Expression:
    if not isinstance(data, list) or len(data) != 3 or data[0] not in names:
        raise ArtifactError(f"expected one of {', '.join(names)} and two operands, got {data!r}")
    if data[0] in ("floordiv", "mod") and (not isinstance(data[2], int) or data[2] < 1):
        raise ArtifactError(f"divisors must be positive numbers, got {data[2]!r}")
    return data[0], _read_number(data[1]), _read_number(data[2])
