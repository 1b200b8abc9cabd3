"""A kernel that awaits its step, with all that could be made ready for the training thread."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.ensemble import Ensemble, ensembles
from esper.kasmina.seat import Seat


@dataclass(frozen=True, eq=False)
class Prepared:
    """A seat in nobody's place yet. Where the layer has changed since, less of it is of use."""

    seat: Seat
    kinds: frozenset[tuple[torch.dtype, torch.device]]  # of its weights
    alpha: Tensor  # of the layer's seeds, where the bank was
    ensembles: list[Ensemble]  # of the seat alone, which compute with this alpha

    def formed(self) -> list[Ensemble]:
        """Return the ensembles of the seat alone that the layer need not form again."""
        return self.ensembles if self.seat.cells.alpha is self.alpha else []


def prepare(seat: Seat, isolated: bool) -> Prepared:
    """Make ready a seat that will be seated for TRAINING, or else for GRAFTING. Loading thread."""
    seat.isolated = isolated
    alpha = seat.cells.alpha  # before: should the bank move meanwhile, the ensembles are outdated
    kinds = frozenset((weight.dtype, weight.device) for weight in seat.kernel.weights())
    return Prepared(seat, kinds, alpha, ensembles([seat]))
