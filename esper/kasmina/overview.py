"""The layers of a wrapped model and their seeds, as a table for people."""

from collections import Counter

from rich.table import Table

from esper.kasmina.layer import KasminaLayer


def seed_table(layers: dict[str, KasminaLayer]) -> Table:
    """Return one row a layer: name, type, width in channels, number of seeds, their states."""
    table = Table("layer", "type", title=f"{len(layers)} layers with seeds", title_justify="left")
    table.add_column("width", justify="right")
    table.add_column("seeds", justify="right")
    table.add_column("states")
    for layer in layers.values():
        width = "seen at the first forward" if layer.shapes is None else str(layer.shapes.channels)
        name = layer.name or "(the model itself)"
        table.add_row(name, layer.host_name, width, str(layer.num_seeds), _states(layer))
    return table


def _states(layer: KasminaLayer) -> str:
    counts = Counter(state.name for state in layer.state_layout.lifecycle_states())
    if len(counts) == 1:
        return next(iter(counts)).lower()
    return ", ".join(f"{count} {name.lower()}" for name, count in counts.items())
