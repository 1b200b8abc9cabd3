"""What a block looks like to a compiler: which kernels are seated in it, and in what state.

A seed has three forms, whatever becomes of it: in isolation (TRAINING), heard and learning
(GRAFTING, FINE_TUNING), heard and frozen (STABILIZATION, EVALUATING, FOSSILIZED).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from esper.kasmina.kernel import Kernel
from esper.kasmina.seat import Seat
from esper.kasmina.seats import Seats, seats_of

MAX_FORMS = 3
Form = tuple[Any, ...]  # which seats a block has, in what state; () while all are dormant


def form_of(layers: Iterable[tuple[str, nn.Module]]) -> Form:
    """Return the form of a block, given its layers that can carry seeds."""
    return tuple(
        (
            name,
            seat.seed_idx,
            seat.kernel.artifact_id,
            seat.isolated,
            seat.learns,
            seat.bypassed,
        )
        for name, layer in layers
        if (seats := seats_of(layer)) is not None
        for seat in seats.occupants()
    )


def num_forms(kernel: Kernel) -> int:
    """Return how many forms :func:`forms` takes a new seat for ``kernel`` through."""
    return MAX_FORMS if kernel.weights() else MAX_FORMS - 1


def forms(seats: Seats, seat: Seat) -> Iterator[None]:
    """Take a seat through its forms: in isolation, heard and learning, heard and frozen."""
    if seat.kernel.weights():
        seats.isolate(seat)
        yield
    yield from later_forms(seats, seat)


def later_forms(seats: Seats, seat: Seat) -> Iterator[None]:
    """Take a seat through the forms that come after the one that it has."""
    if seat.isolated or seat not in seats.occupants():
        seats.admit(seat)
        yield
    if seat.learns:
        seat.let_learn(False)
        yield
