"""``load_state_dict`` of a grown model: the kernels that it needs are seated first.

Which ones, the seats' marks say that it contains; the kernels themselves come from the connected
library, verified as always.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esper.contracts import SeedId, SeedState
from esper.errors import EsperError
from esper.kasmina.lifecycle import ACTIVE
from esper.kasmina.seat_mark import SeatMark, unpack_mark
from esper.kasmina.seats import SEATS

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina
    from esper.kasmina.layer import KasminaLayer

_EXTRA_STATE = "_extra_state"  # torch's name for it


def check_kernels_in_place(kasmina: "Kasmina", state_dict: Mapping[str, Any]) -> None:
    """Raise :class:`EsperError` unless ``state_dict`` can be loaded strictly.

    Each kernel in place must be the one that it has weights for, and a library must be connected
    if it has weights for others.
    """
    marks, present = _marks(kasmina, state_dict, ""), _present(kasmina)
    surplus = {seed_id: present[seed_id] for seed_id in present.keys() - marks.keys()}
    if surplus:
        raise EsperError(
            f"the state_dict has no weights for kernels that are in place: {_listed(surplus)}; "
            "cull them, or load it into a freshly wrapped model"
        )
    for seed_id, artifact_id in present.items():
        if artifact_id != marks[seed_id].artifact_id:
            raise EsperError(
                f"the state_dict has weights for kernel {_listed({seed_id: marks[seed_id].artifact_id})}, "
                f"where {artifact_id} is in place"
            )
    missing = {seed_id: marks[seed_id].artifact_id for seed_id in marks.keys() - present.keys()}
    if missing and kasmina.library is None:
        raise EsperError(
            f"the state_dict is of a grown model and needs kernels ({_listed(missing)}): "
            "call model.connect(library) first"
        )


def seat_missing_kernels(kasmina: "Kasmina", state_dict: Mapping[str, Any], prefix: str) -> None:
    """Seat the kernels that ``state_dict`` (below ``prefix``) has weights for.

    Those that are in place already keep their state and alpha. Without a library nothing happens.
    Raises :class:`EsperError`, before anything is changed, if a kernel cannot be had or its seed is
    taken.
    """
    if kasmina.library is None:
        return
    present = _present(kasmina)
    missing = {
        seed_id: mark
        for seed_id, mark in _marks(kasmina, state_dict, prefix).items()
        if seed_id not in present
    }
    for name, seed_idx in missing:
        _check_free(kasmina.layers[name], seed_idx)
    kernels = {
        (name, seed_idx): kasmina.loads.load(kasmina.layers[name], seed_idx, mark.artifact_id)
        for (name, seed_idx), mark in missing.items()
    }
    for (name, _), kernel in kernels.items():
        kasmina.enrollment.check(kasmina.layers[name], kernel)
    for (name, seed_idx), mark in missing.items():
        kernel = kernels[name, seed_idx]
        kasmina.seat_at_once(kasmina.layers[name], seed_idx, kernel, mark.state, mark.alpha)


def _present(kasmina: "Kasmina") -> dict[SeedId, str]:
    """Return seed -> artifact of the kernels whose weights are in the model's ``state_dict()``."""
    return {
        (name, seat.seed_idx): seat.kernel.artifact_id
        for name, layer in kasmina.layers.items()
        for seat in layer.occupants()
        if not seat.isolated
    }


def _check_free(layer: "KasminaLayer", seed_idx: int) -> None:
    state = layer.state(seed_idx)
    if state is not SeedState.DORMANT:
        raise EsperError(
            f"the state_dict has a kernel for {layer.seed_name(seed_idx)}, which is {state.name}; "
            "it must be DORMANT"
        )


def _marks(
    kasmina: "Kasmina", state_dict: Mapping[str, Any], prefix: str
) -> dict[SeedId, SeatMark]:
    marks = {}
    for name in kasmina.layers:
        seats = f"{prefix}{name}.{SEATS}." if name else f"{prefix}{SEATS}."
        for key in [key for key in state_dict if key.startswith(seats)]:
            seed_idx, _, rest = key.removeprefix(seats).partition(".")
            if rest == _EXTRA_STATE:
                marks[name, int(seed_idx)] = unpack_mark(state_dict[key])
    for seed_id, mark in marks.items():
        if mark.state not in ACTIVE:
            raise EsperError(f"the state_dict has a kernel at {seed_id} that is {mark.state.name}")
    return marks


def _listed(kernels: dict[SeedId, str]) -> str:
    return ", ".join(
        f"{artifact_id} for seed {seed_idx} on '{name}'"
        for (name, seed_idx), artifact_id in sorted(kernels.items())
    )
