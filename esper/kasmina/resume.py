"""What has to be known of a model's seeds, beside tensors, to go on where it stopped."""

from esper.config import SeedSettings
from esper.contracts import Contract, GraftingStrategy, KasminaControlCommand, SeedId
from esper.kasmina.site import SiteShapes


class SeatRecord(Contract):
    """One kernel in its place."""

    seed_idx: int
    artifact_id: str
    isolated: bool
    bypassed: bool
    failure: str | None
    frozen: tuple[str, ...]  # parameters that do not require a gradient


class ShapesRecord(Contract):
    """Shapes at a layer, with None where any size may come."""

    inp: tuple[int | None, ...]
    out: tuple[int | None, ...]
    channel_dim: int
    shares_positions: bool
    observed: bool  # in a forward, not read off the module's attributes
    dtype: str  # of the output

    def site_shapes(self) -> SiteShapes:
        return SiteShapes(self.inp, self.out, self.channel_dim, self.shares_positions)


class LayerRecord(Contract):
    """One host layer; ``seats`` in the order in which they compute."""

    name: str
    host: str
    num_seeds: int
    shapes: ShapesRecord | None
    seats: tuple[SeatRecord, ...]


class TenancyRecord(Contract):
    """What one seed is going through."""

    seed_id: SeedId
    artifact_id: str
    strategy: GraftingStrategy | None
    alpha: float
    steps_left: int | None


class KasminaRecord(Contract):
    """All seeds of a model between two steps. The seed bank's fields are tensors, kept apart."""

    settings: SeedSettings
    layers: tuple[LayerRecord, ...]
    tenancies: tuple[TenancyRecord, ...]
    epoch: int
    step_count: int
    next_due: int
    observing: bool
    observed_step: int
    snapshot_pending: bool
    refresh_pending: bool
    obeyed: tuple[str, ...]  # ids of commands
    commands: tuple[KasminaControlCommand, ...]  # that wait for the next step
