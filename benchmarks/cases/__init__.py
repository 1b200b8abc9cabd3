"""The cases by name. Each checks its results and then returns its rows."""

from collections.abc import Callable

from benchmarks.cases import dormant
from benchmarks.harness import Plan
from benchmarks.rows import Context, Row

CASES: dict[str, Callable[[Plan, Context], list[Row]]] = {"dormant": dormant.run}
