"""Draws the rows: ``python benchmarks/plot.py results/*.json [--plots DIR]`` writes PNG files.

One figure a case shows its ratios with their intervals; curves, such as cost against width, get a
figure for each axis.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a file, not as a module

from benchmarks.rows import Row, read_json

NEUTRAL, MET, MISSED = "#5b6770", "#1b7837", "#c0392b"
COLORS = ("#2166ac", "#e08214", "#1b7837", "#762a83", "#b2182b", "#8c6d31", "#5b6770")
ROWS_PER_FIGURE = 40
Y_LABELS = {"x": "time / unwrapped", "us": "microseconds", "GB/s": "GB/s"}


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all figures that the rows give into ``folder``, and return the files."""
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    figures = dict([*ratio_figures(rows), *curve_figures(rows)])
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def ratio_figures(rows: Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """Yield, for each case and device, a figure of its ratios that lie on no curve."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.unit == "x" and row.point is None:
            groups[row.context.device, row.case].append(row)
    for (device, case), group in groups.items():
        for part, first in enumerate(range(0, len(group), ROWS_PER_FIGURE)):
            suffix = f"-{part + 1}" if len(group) > ROWS_PER_FIGURE else ""
            yield f"{device}-{case}{suffix}", draw_ratios(group[first : first + ROWS_PER_FIGURE])


def draw_ratios(rows: Sequence[Row]) -> Any:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = _figure(height=1.4 + 0.3 * len(rows))
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        color = {None: NEUTRAL, True: MET, False: MISSED}[row.met]
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=2)
        axes.plot(row.value, place, "o", color=color, markersize=5)
        axes.annotate(
            f"{row.value:.3f}" + (f"   (target {row.target})" if row.target else ""),
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=color,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [row.row for row in rows], fontsize=8)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.grid(axis="x", alpha=0.3)
    if max(row.high for row in rows) > 3 * min(row.low for row in rows) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    axes.set_xlabel("ratio, with its 99 % interval (green: target met, red: missed)")
    _title(axes, rows[0].case, rows[0])
    return figure


def curve_figures(rows: Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """Yield a figure for each axis of each case and device."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.point is not None:
            groups[row.context.device, row.case, row.point.axis].append(row)
    for (device, case, axis), group in groups.items():
        slug = "-".join("".join(c if c.isalnum() else " " for c in axis.lower()).split())
        yield f"{device}-{case}-against-{slug}", draw_curves(case, axis, group)


def draw_curves(case: str, axis: str, rows: Sequence[Row]) -> Any:
    figure, axes = _figure(height=4.8)
    for (curve, points), color in zip(_curves(rows).items(), itertools.cycle(COLORS)):
        xs = [_x(row) for row in points]
        ys, lows, highs = zip(*map(_heights, points), strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, color=color, label=curve)
        axes.fill_between(xs, lows, highs, color=color, alpha=0.2, linewidth=0)
    in_bytes = axis.startswith("size")
    ticks = sorted({_x(row) for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [_in_bytes(x) if in_bytes else f"{x:,.0f}" for x in ticks])
    unit = "GB/s" if any(row.unit == "GB/s" for row in rows) else rows[0].unit
    if unit == "x":
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel(axis)
    axes.set_ylabel(Y_LABELS[unit])
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _title(axes, f"{case}, against the {axis}", rows[0])
    return figure


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        assert row.point is not None
        curves[row.point.curve].append(row)
    return {curve: sorted(points, key=_x) for curve, points in curves.items()}


def _x(row: Row) -> float:
    assert row.point is not None
    return row.point.x


def _heights(row: Row) -> tuple[float, float, float]:
    """Return value and interval; a share of a bandwidth as the bandwidth that it is."""
    in_share = row.baseline is not None and row.baseline.unit == "GB/s"
    scale = row.baseline.value if row.baseline is not None and in_share else 1.0
    return row.value * scale, row.low * scale, row.high * scale


def _in_bytes(size: float) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=130)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(axes: Any, title: str, row: Row) -> None:
    """Name the figure, and below in small print where its numbers come from."""
    context = row.context
    commit = (context.commit or "no commit")[:12] + (", dirty" if context.dirty else "")
    versions = ", ".join(f"{name} {version}" for name, version in context.versions.items())
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    place = (
        f"{context.machine}; {context.device}, {context.threads} thread(s); {versions}; {commit}"
    )
    axes.text(0, 1.0, place, transform=axes.transAxes, fontsize=6.5, color=NEUTRAL, va="bottom")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot.py", description="Draws the rows of a run.")
    parser.add_argument("rows", nargs="+", type=Path, metavar="JSON", help="written by run.py")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="default: beside the first file")
    options = parser.parse_args(arguments)
    missing = [path for path in options.rows if not path.is_file()]
    if missing:
        parser.error(f"there is no file {missing[0]}")
    rows = [row for path in options.rows for row in read_json(path)]
    for path in write_plots(rows, options.plots or options.rows[0].parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
