"""What one measured number says of itself, and how numbers are printed and stored."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Console
from rich.table import Table


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Context(_Frozen):
    """Where and on what a number was measured."""

    commit: str | None  # None outside of a git checkout, or before its first commit
    dirty: bool | None  # None outside of a git checkout
    machine: str
    versions: dict[str, str]
    threads: int
    seed: int
    device: str


class Baseline(_Frozen):
    """What a number is relative to, with the baseline's own cost per call."""

    name: str
    value: float
    unit: str


class Point(_Frozen):
    """Where a number lies on a curve: rows that share ``curve`` and ``axis`` are drawn as one."""

    curve: str
    axis: str
    x: float


class Finding(_Frozen):
    """One number, without where it comes from.

    For times, ``low`` and ``high`` are the 99% bootstrap interval and ``spread`` the 20% and 80%
    quantiles of the samples; for counts, which hardly vary, they are the extremes seen.
    """

    row: str
    metric: str
    value: float
    low: float
    high: float
    spread: tuple[float, float] | None = None
    samples: int | None = None  # how many the interval rests on
    unit: str
    baseline: Baseline | None = None
    point: Point | None = None
    target: str | None = None  # in words; None for what is only compared with
    met: bool | None = None


class Row(Finding):
    """A number with the case that found it and its context."""

    case: str
    context: Context


_ROWS = TypeAdapter(list[Row])
_DECIMALS = {"x": 4, "us": 2, "s": 2, "GB/s": 2, "B": 1}


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as one JSON list."""
    path.write_bytes(_ROWS.dump_json(list(rows), indent=2) + b"\n")


def read_json(path: Path) -> list[Row]:
    return _ROWS.validate_json(path.read_bytes())


def print_table(rows: Sequence[Row], console: Console) -> None:
    table = Table(title=rows[0].case, title_justify="left")
    table.add_column("row", min_width=24)
    for heading in ("value", "low .. high", "20% .. 80%", "baseline"):
        table.add_column(heading, justify="right")
    table.add_column("target")
    table.add_column("met", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def print_context(context: Context, console: Console) -> None:
    """Print what all tables of a run have in common."""
    dirty = ", dirty" if context.dirty else ""
    versions = ", ".join(f"{name} {version}" for name, version in context.versions.items())
    console.print(f"{context.machine}; {context.device}, {context.threads} thread(s)")
    console.print(f"{versions}; commit {context.commit or 'none'}{dirty}; seed {context.seed}")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.row,
        _quantity(row.value, row.unit),
        _range(row.low, row.high, row.unit),
        _range(*row.spread, row.unit) if row.spread else "",
        _quantity(row.baseline.value, row.baseline.unit) if row.baseline else "",
        row.target or "",
        "" if row.met is None else "yes" if row.met else "[bold red]NO[/]",
    )


def _quantity(value: float, unit: str) -> str:
    return f"{_number(value, unit)} {unit}"


def _range(low: float, high: float, unit: str) -> str:
    return f"{_number(low, unit)} .. {_number(high, unit)}"


def _number(value: float, unit: str) -> str:
    return f"{value:,.{_DECIMALS.get(unit, 0)}f}"
