"""One observed step, on its way from the training thread to whoever makes signals of it."""

from dataclasses import dataclass

from esper.kasmina.bank import Snapshot
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.morph import DeviceTimer
from esper.kasmina.saturation import Reach, reach_of


@dataclass(frozen=True)
class LayerObservation:
    """Where a layer's seeds are in the snapshot, how long its forward took, and what bounds it."""

    name: str
    first_seed: int
    num_seeds: int
    execution_time_us: float
    reach: Reach | None


@dataclass(frozen=True)
class Observation:
    """One observed step, handed to whoever turns it into health signals."""

    snapshot: Snapshot
    watched: tuple[tuple[KasminaLayer, DeviceTimer | None], ...]
    epoch: int
    step: int
    handed_out_step: int  # later than ``step``, by what the copy from the device took

    @property
    def layers(self) -> tuple[LayerObservation, ...]:
        """What was observed of each layer. Any thread: gathering it is left to whoever reads it."""
        return tuple(
            LayerObservation(
                layer.name,
                layer.first_seed,
                layer.num_seeds,
                0.0 if timer is None else timer.elapsed_us(),
                reach_of(layer.host_name, layer.default_transform),
            )
            for layer, timer in self.watched
        )
