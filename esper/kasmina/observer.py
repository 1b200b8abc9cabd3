"""What watches one layer: for its shapes at the first forward, for its statistics on observed steps.

A model of a hundred layers goes through here a hundred times in one step, with caches that the
model has just filled with its weights. So what is needed each time is done in few calls, and what
is needed once is done elsewhere.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# What ends a recomputation early; torch.utils.checkpoint raises it where tensors are saved.
from torch.utils.checkpoint import _StopRecomputationError

import esper.ops as ops
from esper.kasmina.morph import DeviceTimer, first_input, first_output
from esper.kasmina.ragged import rows

if TYPE_CHECKING:
    from esper.kasmina.layer import KasminaLayer

logger = logging.getLogger(__name__)

# Elements from which on a pass is worth saving: fewer lie in the nearest caches, where reading them
# again costs less than the second op's way of making its result.
FUSED_FROM_NUMEL = 2**15

# Channel dimension, health accumulator, first seed and number of seeds, as the ops take them.
Place = tuple[int, Tensor, int, int]


class Observer:
    """Takes in a layer's forwards. Watching must not disturb what is watched: whatever goes wrong
    is logged once per layer.

    Attributes: ``trouble``, what went wrong first, or None, and ``timer``, of the last forward whose
    statistics were taken, or None.
    """

    def __init__(self, layer: "KasminaLayer"):
        self._layer = layer
        self.trouble: str | None = None
        self.timer: DeviceTimer | None = None

    @property
    def device(self) -> torch.device:
        return self._layer.kasmina.bank.device

    def see(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, timer: DeviceTimer
    ) -> None:
        """Take in a forward that returned ``out``: its shapes the first time, its statistics."""
        layer = self._layer
        try:
            plain = type(out) is Tensor and not out.is_nested
            y = out if plain and layer.shown else self._shown_by(args, kwargs, out)
            place = None if y is None else self._place(y)
            if y is not None and place is not None:
                ops.observe_both_passes(y, *place)
                self.timer = timer
        except Exception as error:
            self._report(error)
        if not layer.kasmina.observing:
            layer.rest()

    def relu(self, inp: Any, timer: DeviceTimer) -> Tensor | None:
        """Return ``relu(inp)``, its statistics taken in the same pass, or None if not to be had.

        Where it is None, the host computes and :meth:`see` is told.
        """
        if type(inp) is not Tensor or inp.is_nested or inp.numel() < FUSED_FROM_NUMEL:
            return None
        try:
            known = self._layer.shown and inp.is_floating_point()
            place = self._place(inp) if known else None
            if place is None:
                return None
            out = ops.observed_relu(inp, *place)
        except _StopRecomputationError:
            raise
        except Exception as error:
            self._report(error)
            return None
        timer.stop()
        self.timer = timer
        return out

    def _shown_by(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """Have the layer learn its shapes; return what there is to observe, if anything."""
        inp, y = rows(first_input(args, kwargs)), rows(first_output(out))
        if (inp is not None and inp.is_nested) or (y is not None and y.is_nested):
            return None
        if inp is None or y is None:
            raise TypeError(
                f"seeds need a {self._layer.host_name} whose first input is a tensor, and whose "
                "output, or the first element of it, is a floating-point tensor"
            )
        if y.dim() > 1:
            self._layer.learn_shapes(inp, y)
        return y

    def _place(self, y: Tensor) -> Place | None:
        """Return where the statistics of ``y`` belong, or None if none are to be taken."""
        layer = self._layer
        kasmina, shapes, rank = layer.kasmina, layer.shapes, y.dim()
        if shapes is None or rank < 2 or not kasmina.observing:
            return None
        watched = layer.default_transform.training and torch.is_grad_enabled()
        if not watched or y.device != kasmina.bank.device:
            return None
        dim = layer.kind.channel_dim(rank)
        if y.shape[dim] != shapes.channels:
            return None  # called with several widths: the seeds are those of another one
        return dim, kasmina.bank.fields["health_accumulator"], layer.first_seed, layer.num_seeds

    def _report(self, error: Exception) -> None:
        if self.trouble is None:
            self.trouble = f"{type(error).__name__}: {error}"
            logger.warning("layer '%s' is not observed: %s", self._layer.name, self.trouble)
