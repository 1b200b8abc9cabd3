"""What a block may become: copies of it are taken through the forms that a seed would give it."""

import copy
from collections.abc import Callable, Iterator

from torch import nn

from esper.kasmina.bank import SeedBank, SeedCells
from esper.kasmina.forms import forms, later_forms
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.morph import lend_class
from esper.kasmina.seats import SEATS, Seats, seats_of

Growth = Callable[[nn.Module], Iterator[None]]  # takes a copy of a block through forms


def seated(name: str, layer: KasminaLayer, seed_idx: int, kernel: Kernel) -> Growth:
    """Take copies through the forms that a copy of ``kernel`` gives them, in a dormant layer."""

    def grow(twin: nn.Module) -> Iterator[None]:
        host = twin.get_submodule(name)
        cells = SeedCells(SeedBank(layer.num_seeds, layer.device), 0, layer.num_seeds)
        seat = layer.make_seat(seed_idx, copy.deepcopy(kernel), cells)
        seats = Seats()
        host.add_module(SEATS, seats)
        lend_class(host)
        yield from forms(seats, seat)

    return grow


def later(name: str, seed_idx: int) -> Growth:
    """Take copies through the forms that come after the one that a seat in them has."""

    def grow(twin: nn.Module) -> Iterator[None]:
        seats = seats_of(twin.get_submodule(name))
        assert seats is not None
        seat = seats.occupant(seed_idx)
        assert seat is not None
        yield from later_forms(seats, seat)

    return grow


def one_by_one(growth: Growth, num_forms: int) -> list[Growth]:
    """Return growths that take a copy to one of the forms each."""
    return [_to_form(growth, number) for number in range(num_forms)]


def _to_form(growth: Growth, wanted: int) -> Growth:
    def grow(twin: nn.Module) -> Iterator[None]:
        for number, _ in enumerate(growth(twin)):
            if number == wanted:
                yield

    return grow
