"""``esper urza list``: what a library holds, for people or as JSON."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.contracts import BlueprintRecord, KernelRecord, KernelStatus, SiteSignature
from esper.urza.protocol import Library

_COLOURS = {
    KernelStatus.VALIDATED: "green",
    KernelStatus.REJECTED: "red",
    KernelStatus.UNDECIDED: "yellow",
    KernelStatus.PENDING_BENCHMARKING: "",
}


def show(library: Library, console: Console) -> None:
    """Print a table of the blueprints and one of the kernels, oldest first."""
    console.print(_blueprints(library.blueprint_records()))
    console.print(_kernels(library.kernels()))
    console.print("esper urza list --json has the ids in full", style="dim", highlight=False)


def as_json(library: Library) -> str:
    """Return ``{"blueprints": [...], "kernels": [...]}``, the records whole, oldest first."""
    records = {
        "blueprints": [record.model_dump(mode="json") for record in library.blueprint_records()],
        "kernels": [record.model_dump(mode="json") for record in library.kernels()],
    }
    return json.dumps(records, indent=2)


def _blueprints(records: Sequence[BlueprintRecord]) -> Table:
    table = _table(f"{len(records)} blueprints", "blueprint", "design", "site", "status")
    for record in records:
        blueprint = record.blueprint
        table.add_row(
            record.blueprint_id[:12],
            blueprint.design.name,
            _site(blueprint.site, blueprint.dtype),
            record.status.value,
        )
    return table


def _kernels(records: Sequence[KernelRecord]) -> Table:
    columns = ("kernel", "design", "site", "pipeline", "status", "tags")
    table = _table(f"{len(records)} kernels", *columns)
    for column in ("latency", "risk"):
        table.add_column(column, justify="right")
    for record in records:
        manifest = record.manifest
        table.add_row(
            record.artifact_id[:12],
            manifest.design.name,
            _site(manifest.site, manifest.dtype),
            manifest.pipeline.value,
            _status(record),
            ", ".join(record.tags),
            "" if record.latency_us is None else f"{record.latency_us:,.1f} us",
            "" if record.risk_score is None else f"{record.risk_score:.2f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _site(site: SiteSignature, dtype: str) -> str:
    return f"{site.host} {_shape(site.inp_shape)} > {_shape(site.act_shape)} {dtype}"


def _shape(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _status(record: KernelRecord) -> Text:
    status = record.status.value + (", archived" if record.archived else "")
    return Text(status, _COLOURS[record.status])
