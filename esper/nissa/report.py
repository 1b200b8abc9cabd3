"""The report of one run: a single HTML file that needs nothing else, offline and for good."""

import re
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import esper.nissa.charts as charts
import esper.nissa.figures as figures
import esper.nissa.formats as formats
import esper.nissa.story as story
from esper.contracts import KernelStatus, SeedState
from esper.nissa.adaptations import adaptations
from esper.nissa.record import KernelConsidered, RunRecord

GLOSSARY = {
    "Seed": "a place on a layer where something can grow. It costs nothing while it sleeps.",
    "Blueprint": "the design of a small network that may be grown into a seed.",
    "Kernel": "a blueprint compiled for one kind of layer, ready to be loaded during training.",
    "Alpha": "how far a kernel is blended in: 0 is the layer alone, 1 the kernel's full output.",
    "Epoch": "one pass over the training data; the first is epoch 0, here as in logs and events.",
    "Held-out loss": "the error on data that the network is not trained on; less is better.",
    "Contribution": "held-out loss without the kernel minus with it: positive means that it helps.",
    "Kasmina": "the execution layer: carries the seeds and swaps kernels in and out between steps.",
    "Tezzeret": "the forge: compiles blueprints into kernels.",
    "Urabrask": "the evaluator: tries out every kernel in a sandbox, and alone may validate one.",
    "Urza": "the library: keeps blueprints, kernels, reports and the audit chain.",
    "Oona": "the message bus between them.",
    "Tamiyo": "the controller: notices that a layer is a bottleneck, and decides what to grow.",
    "Tolaria": "the training loop.",
    "Nissa": "observability: this report.",
}


_WAITING = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{0}: Esper run report</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 1rem/1.5 system-ui, sans-serif; }}</style>
</head><body data-state="waiting"><p><b>{0}</b>: waiting for the run to begin.</p></body></html>
"""


def write_report(record: RunRecord, path: Path) -> None:
    """Write ``record`` as one HTML file; the same record gives the same bytes."""
    path.write_text(render_report(record), encoding="utf-8", newline="\n")


def render_waiting(name: str) -> str:
    """Return the page of a run of which nothing is known yet."""
    return _WAITING.format(escape(name))


def render_report(record: RunRecord) -> str:
    x = charts.step_scale(record)
    plots = (charts.loss_chart, charts.accuracy_chart, charts.alpha_chart)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            headline=story.headline(record),
            verdict=story.verdict(record.results),
            details=story.details(record),
            designs=story.designs(record),
            adaptations=adaptations(record),
            figures=figures.figures(record),
            ended=record.finished or record.interrupted,
            charts=[chart for plot in plots if (chart := plot(record, x))],
            epoch_ticks=charts.epoch_ticks(record, x),
            markers=charts.markers(record, x),
            timelines=charts.timelines(record, x),
            widest=max((layer.channels for layer in record.before + record.after), default=1),
            lived_states=_lived_states(record),
            network_states=_network_states(record),
            reasons={entry.kernel.artifact_id: _reasons(entry) for entry in record.kernels},
            glossary=GLOSSARY,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": formats.bytes_,
        "code": _code,
        "count": formats.count,
        "date": _date,
        "duration": formats.duration,
        "effect": formats.effect,
        "flops": formats.flops,
        "loss": formats.loss,
        "microseconds": formats.microseconds,
        "number": formats.number,
        "parameters": figures.parameters,
        "percent": formats.percent,
        "plural": formats.plural,
        "seed": formats.seed_label,
        "shape": formats.shape,
        "site": formats.site_label,
        "state": formats.state_label,
    }
    return environment


def _code(text: str) -> Markup:
    """Set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _reasons(entry: KernelConsidered) -> list[str]:
    """Why the kernel was rejected; empty for the others."""
    if entry.kernel.status is not KernelStatus.REJECTED:
        return []
    checks = entry.report.checks if entry.report else ()
    return [f"{check.name}: {check.reason}" for check in checks if not check.passed] or [
        "no reason was recorded"
    ]


def _lived_states(record: RunRecord) -> list[SeedState]:
    return sorted({event.target for event in record.lifecycle} - {SeedState.DORMANT})


def _network_states(record: RunRecord) -> list[SeedState]:
    return sorted({seed.state for layer in record.before + record.after for seed in layer.seeds})
