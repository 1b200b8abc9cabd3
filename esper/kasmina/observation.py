"""One observed step, on its way from the training thread to whoever makes signals of it."""

from dataclasses import dataclass

from esper.kasmina.bank import Snapshot
from esper.kasmina.layer import KasminaLayer


@dataclass(frozen=True)
class LayerObservation:
    """Where a layer's seeds are in the snapshot, and how long its forward took."""

    name: str
    first_seed: int
    num_seeds: int
    execution_time_us: float

    @classmethod
    def of(cls, layer: KasminaLayer) -> "LayerObservation":
        return cls(layer.name, layer.first_seed, layer.num_seeds, layer.observed_time_us())


@dataclass(frozen=True)
class Observation:
    """One observed step, handed to whoever turns it into health signals."""

    snapshot: Snapshot
    layers: tuple[LayerObservation, ...]
    epoch: int
    step: int
