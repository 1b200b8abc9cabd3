"""A report for people: a table of its checks, and what was measured."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.contracts import Check, KernelStatus, Measurement, RiskSource, UrabraskValidationReport

_COLOURS = {
    KernelStatus.VALIDATED: "green",
    KernelStatus.REJECTED: "red",
    KernelStatus.UNDECIDED: "yellow",
}


def show(report: UrabraskValidationReport, console: Console) -> None:
    verdict = Text(report.status.value, style=f"bold {_COLOURS[report.status]}")
    console.print(Text("kernel ") + Text(report.artifact_id, style="bold") + Text(": ") + verdict)
    console.print(_checks(report.checks))
    if report.measurement is not None:
        console.print(_measurement(report.measurement))
    for name, value in _summary(report):
        console.print(Text(f"{name}: ", style="dim") + Text(value))


def _checks(checks: tuple[Check, ...]) -> Table:
    table = Table("check", "", "what was found", "numbers")
    for check in checks:
        mark = Text("passed", "green") if check.passed else Text("failed", "bold red")
        numbers = "\n".join(f"{name} {number:.3g}" for name, number in check.numbers.items())
        # As Text, since a candidate has a say in some reasons, and rich reads markup in strings.
        table.add_row(check.name, mark, Text(check.reason), Text(numbers))
    return table


def _measurement(measured: Measurement) -> Table:
    table = Table(title=f"measured at batch {measured.batch_size}", title_justify="left")
    for column in ("", "mean", "p50", "p99", "eager p50", "eager / kernel"):
        table.add_column(column, justify="right" if column else "left")
    for name, *latencies, eager in (
        (
            "forward",
            measured.forward_mean_us,
            measured.forward_p50_us,
            measured.forward_p99_us,
            measured.eager_forward_p50_us,
        ),
        (
            "forward and backward",
            measured.forward_backward_mean_us,
            measured.forward_backward_p50_us,
            measured.forward_backward_p99_us,
            measured.eager_forward_backward_p50_us,
        ),
    ):
        p50 = latencies[1]
        ratio = f"{eager / p50:.2f} x" if eager and p50 else ""
        table.add_row(name, *map(_microseconds, (*latencies, eager)), ratio)
    return table


def _summary(report: UrabraskValidationReport) -> Iterator[tuple[str, str]]:
    measured = report.measurement
    if measured is not None:
        if measured.samples_per_s is not None:
            yield "throughput", f"{measured.samples_per_s:,.0f} samples/s, forward and backward"
        if measured.spread is not None:
            yield "spread", f"{measured.spread:.1%} of the ratio to eager"
        if measured.power_w is not None:
            yield (
                "power",
                f"{measured.power_w:.0f} W, {measured.energy_per_sample_mj:.3g} mJ/sample",
            )
        yield "peak memory", f"{measured.memory_bytes:,} bytes"
    if report.max_relative_error is not None:
        yield "drift", f"{report.max_relative_error:.1e} of the norm against float64"
    if report.tags:
        yield "tags", ", ".join(report.tags)
    yield from _judgement(report)
    yield "machine", f"{report.machine}, torch {report.torch_version}"
    if report.sandbox:
        yield "sandbox", report.sandbox
    if report.hidden_seed is not None:
        yield "hidden seed", str(report.hidden_seed)


def _judgement(report: UrabraskValidationReport) -> Iterator[tuple[str, str]]:
    yield "risk", f"{report.risk_score:g} by the {report.risk_by.value}"
    if report.risk_reason:
        yield (
            "why by them" if report.risk_by is RiskSource.RULES else "why by it",
            report.risk_reason,
        )
    if parts := report.risk_components:
        listed = ", ".join(f"{name} {part:.3f}" for name, part in parts.items())
        yield "risk by the rules", f"{sum(parts.values()):.2f} ({listed})"
    yield "confidence", report.confidence.value
    if report.urabrask_interest:
        yield "interest", f"{report.urabrask_interest:g}: it is unlike its peers"


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} us"
