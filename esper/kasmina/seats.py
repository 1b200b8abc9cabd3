"""The occupied seats of one host layer: what its active class computes after the host."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import esper.reference as reference
from esper.kasmina.ensemble import Ensemble, ensembles
from esper.kasmina.seat import Seat


def _keep_off_fast_paths(seats: nn.Module, args: Any) -> None:
    """Do nothing: that a hook exists stops TransformerEncoderLayer from bypassing its children."""


class Seats(nn.ModuleDict):
    """The occupied seats of one layer, by seed index; registered on the layer as ``esper_seeds``.

    Seats in TRAINING are kept out of the module tree: what walks over ``model.parameters()``,
    such as gradient clipping or an average of the weights, must not let them touch the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.isolated: dict[str, Seat] = {}
        self._heard: list[Ensemble] = []  # refilled in place: a module's attributes are set slowly
        self._unheard: list[Ensemble] = []
        self.register_forward_pre_hook(_keep_off_fast_paths)  # never called, so it costs nothing

    def occupants(self) -> list[Seat]:
        return [*cast(Iterable[Seat], self._modules.values()), *self.isolated.values()]

    def occupant(self, seed_idx: int) -> Seat | None:
        key = str(seed_idx)
        return self.isolated.get(key) or cast(Seat | None, self._modules.get(key))

    def isolate(self, seat: Seat, formed: Sequence[Ensemble] = ()) -> None:
        """Let a seat learn unheard; ``formed`` are ensembles that were made ready for it."""
        if not seat.isolated:
            seat.isolated = True
        self.isolated[str(seat.seed_idx)] = seat
        is_alone = formed and len(self.isolated) == 1
        self._unheard[:] = formed if is_alone else ensembles(self.isolated.values(), formed)

    def admit(self, seat: Seat, formed: Sequence[Ensemble] = ()) -> None:
        """Let the host hear a seat; its parameters become the model's."""
        key = str(seat.seed_idx)
        self.isolated.pop(key, None)
        seat.isolated = False
        self[key] = seat
        self.rearrange(formed)

    def remove(self, seed_idx: int) -> None:
        self.isolated.pop(str(seed_idx), None)
        self._modules.pop(str(seed_idx), None)
        self.rearrange()

    def rearrange(self, formed: Sequence[Ensemble] = ()) -> None:
        """Form the ensembles anew: now, since the next forward may be traced by a compiler.

        Those of ``formed``, which are of seats that are new to the layer, will do.
        """
        heard = cast(Iterable[Seat], self._modules.values())
        self._heard[:] = ensembles((seat for seat in heard if not seat.bypassed), formed)
        self._unheard[:] = ensembles(self.isolated.values())

    def apply_to(self, inp: Tensor, host: Tensor, in_place: bool) -> Tensor:
        """Return the layer's output given the host's input and output.

        ``in_place``: nobody but the caller holds ``host``, and no backward pass needs it.
        """
        if not torch.compiler.is_compiling() and _is_transformed():
            return self._apply_plainly(inp, host)
        out = host
        for ensemble in self._heard:
            out = ensemble.blend(inp, out, in_place)
        if self._unheard and torch.is_grad_enabled():
            for seat in self.isolated.values():
                if seat.training is not self.training:
                    seat.train(self.training)
            for ensemble in self._unheard:
                out = ensemble.isolate(inp, out)
        return out

    def _apply_plainly(self, inp: Tensor, host: Tensor) -> Tensor:
        """Blend by operations that torch.func and forward-mode differentiation can transform."""
        heard = cast(Iterable[Seat], self._modules.values())
        seats = [seat for seat in heard if not seat.bypassed and seat.fits(host)]
        if not seats:
            return host
        outs = [seat.call_plainly(inp, host) for seat in seats]
        seeds = [seat.seed_idx for seat in seats]
        starts = [seat.chunk.start for seat in seats]
        dim = seats[0].chunk.channel_dim(host.dim())
        return reference.blend(host, outs, seeds, starts, seats[0].cells.alpha, dim)

    def __getstate__(self) -> dict[str, Any]:
        """Copies form ensembles of their own."""
        return {**self.__dict__, "_heard": [], "_unheard": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rearrange()


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; they know no op of ours."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


SEATS = "esper_seeds"


def seats_of(module: nn.Module) -> Seats | None:
    """Return the seats of an active layer, or None."""
    return cast(Seats | None, module._modules.get(SEATS))
