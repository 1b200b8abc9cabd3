"""How numbers, bytes and seeds are written, in the terminal and in the report."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from esper.contracts import SeedId, SeedState, SiteSignature

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


def effect(contribution: float, standard_error: float | None = None) -> str:
    """What a kernel does to the held-out loss, in words: a bare sign would be read either way."""
    if not math.isfinite(contribution):
        return "has an effect on the held-out loss that could not be measured"
    verb = "raises" if contribution < 0 else "lowers"
    error = "" if standard_error is None else f" ± {loss(standard_error)}"
    return f"{verb} the held-out loss by {loss(abs(contribution))}{error}"


def shape(sizes: Sequence[int | None]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join("any" if n is None else str(n) for n in sizes)


def site_label(site: SiteSignature) -> str:
    """Host, input and the seed's part of the output, without the batch: Linear 64 to 2."""
    inp, act = (shape(sizes[1:]) for sizes in (site.inp_shape, site.act_shape))
    kernel = f", kernel {shape(site.kernel_size)}" if site.kernel_size else ""
    return f"{site.host} {inp} \N{RIGHTWARDS ARROW} {act}{kernel}"


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
