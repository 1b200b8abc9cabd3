"""How numbers, bytes and seeds are written, in the terminal and in the report."""

import math
from collections.abc import Callable
from typing import Any

from esper.contracts import SeedId, SeedState

MISSING = "\N{EN DASH}"
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def _or_missing(format_: Callable[[Any], str]) -> Callable[[Any], str]:
    def formatted(value: Any) -> str:
        if value is None:
            return MISSING
        return format_(value) if math.isfinite(value) else str(value)

    return formatted


@_or_missing
def count(value: float) -> str:
    return f"{value:,.0f}"


@_or_missing
def number(value: float) -> str:
    """Three significant digits, as people write them: 0.0312, 12.3, 1.2e-07."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


@_or_missing
def loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.1e}"


@_or_missing
def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


@_or_missing
def microseconds(value: float) -> str:
    return f"{value:.1f} µs" if value < 1e3 else f"{value / 1e3:.1f} ms"


@_or_missing
def flops(value: float) -> str:
    return _scaled(value, 1000, _FLOPS)


@_or_missing
def bytes_(value: float) -> str:
    return _scaled(value, 1024, _BYTES)


@_or_missing
def duration(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def state_label(state: SeedState) -> str:
    return state.name.lower().replace("_", " ")


def seed_label(seed_id: SeedId) -> str:
    layer, index = seed_id
    return f"{layer} seed {index}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{value:.0f} {units[power]}" if power == 0 else f"{value:.3g} {units[power]}"
